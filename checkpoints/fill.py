"""Fills a module from the tensors of a file, by a key table.

Each tensor is used exactly once, dropped on purpose, or an error. Modules are built on the meta
device, where they take no memory. Their tensors are then assigned: mapped from the file, or moved
to the device one at a time.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from checkpoints.digests import checksums, described, rounded_digests, sample, with_checksums
from checkpoints.files import WeightsError, first_line
from checkpoints.key_tables import their_name
from checkpoints.progress import is_hidden
from speed.int8 import int8_layers

# All other fields of our configs are int.
FIELD_TYPES = {"rope_theta": (int, float), "norm_eps": (int, float), "tied": (bool,)}
MOST = {"rope_theta": 1e12, "norm_eps": 0.1}  # beyond, all positions or all tokens look the same
NOT_FINITE = "it holds NaN or infinity; download or train it again"
PLAIN_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Unfilled(TorchFunctionMode):
    """`with torch.device("meta"), Unfilled():` builds a module's shapes: no draws, no memory.

    Even on the meta device a draw makes PyTorch import modules for two seconds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Names of methods of tensors and of functions of torch.nn.init.
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        # Whisper's positions are computed on the CPU, where their size would be taken in memory.
        if func is torch.arange:
            kwargs = kwargs | {"device": "meta"}
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def build(make: Callable[[], nn.Module], n_layers: int, n_tensors: int, source: Path) -> nn.Module:
    """The module that make() returns, without weights: its shapes alone.

    Raises WeightsError: the config asks for more layers than the file has tensors (a million would
    take minutes), or for sizes that no tensor can have.
    """
    if n_layers > n_tensors:
        counts = f"{n_layers:,} layers by the config, {n_tensors:,} tensors in the file"
        raise WeightsError(f"{source}: tensors do not fit: {counts}")
    try:
        with torch.device("meta"), Unfilled():
            return make()
    except (RuntimeError, TypeError, ArithmeticError) as error:
        problem = f"the config asks for impossible sizes ({first_line(error)})"
        raise WeightsError(f"{source}: {problem}") from error


def named(module: nn.Module, table: dict[str, str]) -> dict[str, Tensor]:
    """The module's tensors under their names in the file, ready to be saved; tied tensors once."""
    ours = module.named_parameters()
    return {their_name(table, name): p.detach().cpu().contiguous() for name, p in ours}


def read_fields(
    config_class: type,
    raw: dict,
    table: dict[str, str],
    fixed: dict[str, tuple],
    source: Path,
    **more,
):
    """A config of ours from the raw fields of a file.

    Args:
        table: our names -> their names. fixed: by their name, the values that we support.
        source: the file that errors name. more: other fields of config_class.
    Raises:
        WeightsError: fields are missing, or have values that our modules cannot do.
    """
    missing = [theirs for theirs in table.values() if raw.get(theirs) is None]
    if missing:
        raise WeightsError(f"{source}: lacks {', '.join(missing)}")

    # Values of another type or size, and those that switch on what we do not have.
    bad = []
    for ours, theirs in table.items():
        value = raw[theirs]
        free = ours == "tied" or ours.endswith("_id")
        right_type = type(value) in FIELD_TYPES.get(ours, (int,))
        if not right_type or not (free or 0 < value <= MOST.get(ours, float("inf"))):
            bad.append(theirs)
    bad += [theirs for theirs, can in fixed.items() if raw.get(theirs) not in (None, *can)]
    if bad:
        found = ", ".join(f"{theirs} is {repr(raw[theirs])[:60]}" for theirs in bad)
        raise WeightsError(f"{source}: {found}, which this code cannot run")

    try:
        return config_class(**{ours: raw[theirs] for ours, theirs in table.items()}, **more)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: {error}") from error


def check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    """Try out the device. Raises WeightsError when it is missing, full, or cannot run `dtype`."""
    name = str(dtype).removeprefix("torch.")
    other = "float16, or float32 where memory allows" if dtype == torch.bfloat16 else "float32"
    cannot = f"cannot run {name}; pass --dtype {other}"

    # Is it there? A torch that was built without CUDA raises AssertionError, others ImportError.
    try:
        torch.ones(1, device=device).cpu()  # the meta device has no numbers
    except (RuntimeError, AssertionError, ImportError) as error:
        problem = f"cannot be used here ({first_line(error)}); try --device cpu"
        raise WeightsError(f"--device {device}: {problem}") from error

    # Attention and a linear layer, in miniature.
    try:
        x = torch.ones(1, 1, 2, 2, device=device, dtype=dtype)
        F.linear(F.scaled_dot_product_attention(x, x, x), x[0, 0])
    except (RuntimeError, TypeError) as error:
        full = isinstance(error, torch.OutOfMemoryError)
        problem = "memory is full already" if full else cannot
        raise WeightsError(f"--device {device}: {problem} ({first_line(error)})") from error

    # An old GPU runs bfloat16, but emulates it.
    bfloat16_gpu = torch.device(device).type == "cuda" and dtype == torch.bfloat16
    if bfloat16_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise WeightsError(f"--device {device}: {cannot} (it would be emulated)")


def assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Make the tensors, by our names, the module's parameters, without a copy; ties stay."""
    new: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) not in new:
            new[id(old)] = nn.Parameter(tensors[name], requires_grad=old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, new[id(old)])


def place(tensor: Tensor, dtype: torch.dtype | None, device: str | torch.device) -> Tensor:
    """The tensor on the device; without a copy where neither device nor dtype changes.

    Raises ValueError: it holds NaN or infinity, or numbers that dtype cannot hold.
    """
    placed = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()
    if not placed.numel():
        return placed

    # This also reads mapped pages now, under the progress bar, not in the first forward pass.
    lowest, highest = placed.aminmax()
    if not (lowest.isfinite() and highest.isfinite()):
        low, high = tensor.aminmax()
        if low.isfinite() and high.isfinite():
            name = str(dtype).removeprefix("torch.")
            raise ValueError(f"its numbers overflow {name}; pass --dtype bfloat16 or float32")
        raise ValueError(NOT_FINITE)
    return placed


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    table: dict[str, str],
    dropped: tuple[str, ...],
    source: Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    note: Callable[[str], None] | None = None,
) -> None:
    """Give every parameter of `module` its tensor, and every tensor its parameter.

    Args:
        tensors: by their names; copied in this order. If they are a Checkpoint, errors name files.
        table: a key table. dropped: prefixes of names to leave out.
        source: the path that errors name.
        dtype: of the parameters; None keeps the file's.
        note: called with the rounded_digests of the file's tensors before they are copied, and with
            their checksums as well once they are.
    Raises:
        WeightsError: tensors do not fit (all are listed, with shapes and files) or are not finite,
            memory is full, or the device cannot be used.
    """
    check_device(device, dtype or torch.float32)
    files = getattr(tensors, "files", {})

    # Before anything is copied: do all tensors fit? Their shapes are enough for that.
    ours = {their_name(table, name): name for name, _ in module.named_parameters()}
    needed = {their_name(table, name): p for name, p in module.named_parameters()}
    found = {}
    for name in tensors:
        if not name.startswith(dropped):
            found[name] = torch.empty_like(tensors[name], device="meta")
    check_fit(needed, found, source, files)

    # What was trained with other weights is refused before they are copied.
    if note:
        named_by_us = {ours[name]: name for name in needed}
        samples = sampled(module, tensors, named_by_us, source, files)
        note(samples)

    # Layers of 8 bits take their weights one by one.
    layers = int8_layers(module)
    takers = {their_name(table, f"{name}.weight"): layer.take for name, layer in layers.items()}

    placed, checks = copied(tensors, found, takers, dtype, device, source, bool(note))
    if note:
        note(with_checksums(samples, {ours[name]: sums for name, sums in checks.items()}))
    assign(module, {ours[name]: tensor for name, tensor in placed.items()})


def copied(
    tensors: Mapping[str, Tensor],
    found: dict[str, Tensor],
    takers: dict[str, Callable[[Tensor], None]],
    dtype: torch.dtype | None,
    device: str | torch.device,
    source: Path,
    with_sums: bool,
) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
    """Tensors on the device and, with_sums, their checksums, both by their names.

    found: shapes of the tensors that are copied. takers: called with a tensor that is then dropped,
    instead of being returned. Others and errors: as for fill.
    """
    files = getattr(tensors, "files", {})
    total = sum(tensor.nbytes for tensor in found.values())
    layout = {"unit": "B", "unit_scale": True, "delay": 1, "leave": False}
    layout |= {"desc": f"loading {Path(source).name}", "disable": is_hidden()}

    # Each tensor is read once: checked, copied and dropped.
    placed = {}
    checks = {}
    done = 0
    with tqdm(total=total, **layout) as bar:
        for name, shape in found.items():
            done += shape.nbytes
            bar.update(shape.nbytes)
            try:
                # A layer of 8 bits keeps its rows, not the tensor.
                if name in takers:
                    takers[name](place(tensors[name], dtype, device))
                else:
                    placed[name] = place(tensors[name], dtype, device)
                if with_sums:
                    checks[name] = checksums(tensors[name])
            except ValueError as error:
                raise WeightsError(f"{files.get(name, source)}: {name}: {error}") from None
            except RuntimeError as error:  # includes torch.OutOfMemoryError
                raise WeightsError(
                    f"{source}: after {done / 1e9:.1f} of {total / 1e9:.1f} GB on {device}: "
                    f"{first_line(error)}; take a smaller model, --dtype bfloat16, or --device cpu"
                ) from error
    return placed, checks


def sampled(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    names: dict[str, str],
    source: Path,
    files: Mapping[str, Path],
) -> str:
    """The rounded_digests of the file's tensors. names: of ours, those in the file.

    Raises WeightsError: a sample is not finite. source, files: as for fill.
    """
    for name in names.values():
        if not sample(tensors[name]).isfinite().all():
            raise WeightsError(f"{files.get(name, source)}: {name}: {NOT_FINITE}")
    named_by_us = ((our, tensors[name]) for our, name in names.items())
    return rounded_digests(named_by_us, described(module.config))


def check_fit(needed: dict, found: dict, source: Path, files: Mapping[str, Path]) -> None:
    """Raise WeightsError that lists all missing, extra, mis-shaped and quantised tensors.

    Args:
        needed: the module's parameters, and found: the file's tensors, both by their names.
        source, files: as for fill.
    """
    problems = []
    for name, parameter in needed.items():
        if name not in found:
            problems.append(f"missing {name} {tuple(parameter.shape)}")

    for name, tensor in found.items():
        shape = tuple(tensor.shape)
        file = Path(files.get(name, source)).name
        if name not in needed:
            problems.append(f"extra {name} {shape} in {file}")
        elif shape != needed[name].shape:
            config = tuple(needed[name].shape)
            problems.append(f"{name} is {shape} in the file, {config} by the config ({file})")
        elif tensor.dtype not in PLAIN_DTYPES:
            problems.append(f"{name} is {tensor.dtype}: quantised weights are not read ({file})")

    if problems:
        if len(problems) > 10:
            problems[10:] = [f"and {len(problems) - 10} more"]
        raise WeightsError("\n  ".join([f"{source}: tensors do not fit", *problems]))

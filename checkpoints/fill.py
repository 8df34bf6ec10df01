"""Fills a module from the tensors of a file, by a key table.

Each tensor is used exactly once, dropped on purpose, or an error. Modules are built on the meta
device, where they take no memory. Their tensors are then assigned: mapped from the file, or moved
to the device one at a time.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from checkpoints.files import WeightsError

PAGE = 4096  # bytes of a memory page
# All other fields of our configs are int.
FIELD_TYPES = {"rope_theta": (int, float), "norm_eps": (int, float), "tied": (bool,)}


class Unfilled(TorchFunctionMode):
    """`with torch.device("meta"), Unfilled():` builds a module's shapes, without random draws.

    Even on the meta device a draw makes PyTorch import modules for two seconds.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Names of methods of tensors and of functions of torch.nn.init.
        if getattr(func, "__name__", "") in ("normal_", "uniform_", "kaiming_uniform_"):
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs)


def their_name(table: dict[str, str], ours: str) -> str:
    """The name in the file of our tensor `ours`, by a key table."""
    numbers = re.findall(r"\.(\d+)(?=\.|$)", ours)
    template = re.sub(r"\.\d+(?=\.|$)", ".{}", ours)
    if template in table:
        return table[template].format(*numbers)
    module, _, leaf = template.rpartition(".")
    return f"{table[module].format(*numbers)}.{leaf}"


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

    # Values of another type, negative ones, and those that switch on what we do not have.
    bad = []
    for ours, theirs in table.items():
        right_type = type(raw[theirs]) in FIELD_TYPES.get(ours, (int,))
        if not right_type or (raw[theirs] < 0 and not ours.endswith("_id")):
            bad.append(theirs)
    bad += [theirs for theirs, can in fixed.items() if raw.get(theirs) not in (None, *can)]
    if bad:
        found = ", ".join(f"{theirs} is {raw[theirs]!r}" for theirs in bad)
        raise WeightsError(f"{source}: {found}, which this code cannot run")

    try:
        return config_class(**{ours: raw[theirs] for ours, theirs in table.items()}, **more)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise WeightsError(f"{source}: {error}") from error


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_device(device: str | torch.device, dtype: torch.dtype) -> None:
    """Try out the device. Raises WeightsError when it is missing, full, or cannot run `dtype`."""
    name = str(dtype).removeprefix("torch.")
    other = "float16, or float32 where memory allows" if dtype == torch.bfloat16 else "float32"
    cannot = f"cannot run {name}; pass --dtype {other}"

    # Is it there? A torch that was built without CUDA raises AssertionError.
    try:
        torch.ones(1, device=device)
    except (RuntimeError, AssertionError) as error:
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
    """The tensor on the device; without a copy where neither device nor dtype changes."""
    placed = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()

    # Read mapped pages now, under the progress bar, not in the first forward pass.
    if placed.is_cpu and placed.numel():
        placed.flatten().view(torch.uint8)[::PAGE].amax()
    return placed


def fill(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    table: dict[str, str],
    dropped: tuple[str, ...],
    source: Path,
    files: Mapping[str, Path] | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> None:
    """Give every parameter of `module` its tensor, and every tensor its parameter.

    Args:
        tensors: by their names; copied in this order.
        table: a key table. dropped: prefixes of names to leave out.
        source: the path that errors name. files: of each tensor, where it is not `source`.
        dtype: of the parameters; None keeps the file's.
    Raises:
        WeightsError: tensors do not fit (all are listed, with shapes and files), memory is full, or
            the device cannot be used.
    """
    check_device(device, dtype or torch.float32)

    # Before anything is copied: do all tensors fit? Their shapes are enough for that.
    ours = {their_name(table, name): name for name, _ in module.named_parameters()}
    needed = {their_name(table, name): p for name, p in module.named_parameters()}
    found = {}
    for name in tensors:
        if not name.startswith(dropped):
            found[name] = torch.empty_like(tensors[name], device="meta")
    check_fit(needed, found, source, files or {})

    placed = {}
    total = sum(tensor.nbytes for tensor in found.values())
    title = f"loading {Path(source).name}"
    with tqdm(total=total, desc=title, unit="B", unit_scale=True, delay=1, leave=False) as bar:
        for name, shape in found.items():
            bar.update(shape.nbytes)
            try:
                placed[ours[name]] = place(tensors[name], dtype, device)
            except RuntimeError as error:  # includes torch.OutOfMemoryError
                raise WeightsError(
                    f"{source}: after {bar.n / 1e9:.1f} of {total / 1e9:.1f} GB on {device}: "
                    f"{first_line(error)}; take a smaller model, --dtype bfloat16, or --device cpu"
                ) from error
    assign(module, placed)


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
        elif not tensor.is_floating_point():
            problems.append(f"{name} is {tensor.dtype}: quantised weights are not read ({file})")

    if problems:
        if len(problems) > 10:
            problems[10:] = [f"and {len(problems) - 10} more"]
        raise WeightsError("\n  ".join([f"{source}: tensors do not fit", *problems]))

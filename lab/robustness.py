"""How well does the model do on degraded recordings: noise, other speeds, a telephone?

    python -m lab.robustness --run runs/toy    writes RUN/ablations/robustness.json, prints a table

Nothing is trained: stage 1 transcribes and stage 2 answers, by the threshold rule, and neither has
met a degraded clip in training. A degradation is a pure function of a waveform (S,) at 16 kHz and a
generator. The targets remain those of the clean clip, also for questions about the speed itself.

Shapes: S samples.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import soundfile
import torch
import torchaudio.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoints.command_line import add_force_parts, one_line_errors
from checkpoints.files import read_json, write_json
from data import AudioError, load_manifest, read_audio
from diffa import DIFFA
from encoder import SAMPLE_RATE
from evaluation.wer import word_error_rate
from lab.findings import markdown
from toy.evaluate import answers_to, questions
from toy.grammar import VOICE_KINDS
from toy.pretrain_lm import THRESHOLD
from training.states import StateCache

TELEPHONE_RATE = 8000  # Hz
MU_LAW_LEVELS = 256  # 8 bits, as in ITU-T G.711
# Width of the resampling filters. torchaudio's default of 6 lets 0.7 % of the power of white noise
# through above 4 kHz.
SHARPNESS = 64


def add_noise(waveform: Tensor, generator: torch.Generator, snr: float) -> Tensor:
    """Add white Gaussian noise to a waveform (S,), `snr` dB below the clip's mean power."""
    noise = torch.randn(waveform.shape, generator=generator)  # (S,)
    power = waveform.pow(2).mean() / 10 ** (snr / 10)
    return waveform + noise * (power / noise.pow(2).mean()).sqrt()


def change_speed(waveform: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    """Play a waveform (S,) `factor` times as fast, (S / factor,), at a pitch as much higher."""
    return F.speed(waveform, SAMPLE_RATE, factor)[0]


def telephone(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """Sample a waveform (S,) at 8 kHz with 8 bits by the mu-law, and back to 16 kHz, (S,)."""
    narrow = F.resample(waveform, SAMPLE_RATE, TELEPHONE_RATE, SHARPNESS).clamp(-1, 1)  # (S / 2,)
    narrow = F.mu_law_decoding(F.mu_law_encoding(narrow, MU_LAW_LEVELS), MU_LAW_LEVELS)
    return F.resample(narrow, TELEPHONE_RATE, SAMPLE_RATE, SHARPNESS)[: len(waveform)]


Degradation = Callable[[Tensor, torch.Generator], Tensor]
CONDITIONS: dict[str, Degradation] = {
    "clean": lambda waveform, generator: waveform,
    **{f"white noise, {n} dB": functools.partial(add_noise, snr=n) for n in (20, 10, 5)},
    **{f"speed {factor}": functools.partial(change_speed, factor=factor) for factor in (0.9, 1.1)},
    "telephone": telephone,
}


def degrade_clips(
    items: list[dict], degrade: Degradation, folder: Path, longest: int
) -> dict[str, str]:
    """Write the items' clips, degraded, into a folder; returns {clip: new file}.

    Clips that are now longer than `longest` samples are left out.
    """
    files = {}
    for i, clip in enumerate(dict.fromkeys(item["audio_filepath"] for item in items)):
        waveform = degrade(read_audio(clip), torch.Generator().manual_seed(i))
        if len(waveform) <= longest:
            files[clip] = str(folder / f"{i:06d}.wav")
            # Floats, because 16 bits would add a noise of their own.
            soundfile.write(files[clip], waveform.numpy(), SAMPLE_RATE, subtype="FLOAT")
    return files


def measure_condition(stage1: DIFFA, stage2: DIFFA, asr: list[dict], instruct: list[dict]) -> dict:
    """WER of stage 1 and accuracies of stage 2 on two manifests of the same clips, in percent."""
    states = StateCache(stage2, asr)
    texts = [reply.text for reply in answers_to(stage1, states, asr, THRESHOLD)]
    table = questions(stage2, states, instruct)
    return {
        "word_error_rate": word_error_rate(texts, [item["transcription"] for item in asr]),
        "content_mean": table["content_mean"],
        "voice_mean": table["voice_mean"],
        "accuracy": {kind: table[kind]["accuracy"] for kind in VOICE_KINDS},
        "items": len(asr),
    }


def measure_run(run: Path, path: Path, **options) -> dict:
    """Measure a run's two stages under each condition; returns {condition: row}, kept in `path`.

    Conditions that `path` already holds are not measured again. options: of load_diffa.

    Raises:
        ManifestError, AudioError: clips cannot be used. WeightsError: no encoder, LM or adapters.
    """
    rows = read_json(path) if path.is_file() else {}
    asr = load_manifest(run / "corpus/asr_test.json")
    instruct = load_manifest(run / "corpus/instruct_test.json")
    stage1, stage2 = (
        DIFFA.from_pretrained(run / "whisper", run / "llada", run / stage, **options).eval()
        for stage in ("stage1", "stage2")
    )
    longest = stage1.encoder.config.n_samples

    for name, degrade in tqdm(CONDITIONS.items(), "robustness", disable=None):
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = degrade_clips(asr, degrade, Path(folder), longest)
            if not files:
                raise AudioError(f"{name}: no clip fits the encoder's window; choose shorter clips")
            clips, answered = (
                [
                    i | {"audio_filepath": files[i["audio_filepath"]]}
                    for i in items
                    if i["audio_filepath"] in files
                ]
                for items in (asr, instruct)
            )
            row = measure_condition(stage1, stage2, clips, answered)

        # Written after each condition, so that a run that is stopped can resume.
        rows[name] = row | {"too_long": len(asr) - len(clips)}
        write_json(path, rows)
    return rows


def robustness_table(rows: dict) -> str:
    """WER and accuracies by condition, with the clips measured and left out."""
    cells = []
    for name, row in rows.items():
        numbers = [row["word_error_rate"], row["content_mean"], row["voice_mean"]]
        numbers += [row["accuracy"][kind] for kind in VOICE_KINDS]
        counts = [str(row["items"]), str(row["too_long"])]
        cells.append([name, *(f"{number:.1f}" for number in numbers), *counts])

    heads = ["condition", "WER %", "content %", "voice %", *VOICE_KINDS, "clips", "too long"]
    return markdown(heads, cells)


def main(arguments: list[str] | None = None) -> None:
    name = "python -m lab.robustness"
    parser = argparse.ArgumentParser(prog=name, description="WER and accuracies, degraded clips.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="from `make demo`")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add_force_parts(parser)
    options = vars(parser.parse_args(arguments))
    run = options.pop("run")

    with one_line_errors(name):
        rows = measure_run(run, run / "ablations/robustness.json", **options)
    print(robustness_table(rows))


if __name__ == "__main__":
    main()

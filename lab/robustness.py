"""How much does it understand of a worse recording? The held-out clips with noise, at other speeds, by telephone.

    python -m lab.robustness --run runs/toy        writes runs/toy/ablations/robustness.json and prints a table

Nothing is trained: stage 1 transcribes and stage 2 answers, by the threshold rule, what neither has met in training. A
degradation is a pure function of a waveform (S,) at 16 kHz and a generator; the questions' answers stay those of the clean
clip, also where the speed itself is asked about.

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

from training.clips import StateCache
from checkpoints.files import read_json, write_json
from data import AudioError, ManifestError, load_manifest, read_audio, word_error_rate
from diffa import DIFFA
from encoder import SAMPLE_RATE
from toy.evaluate import THRESHOLD, answer, questions
from lab.findings import robustness_table

TELEPHONE_RATE = 8000  # Hz
MU_LAW_LEVELS = 256  # 8 bits, as ITU-T G.711 has them
SHARPNESS = 64  # of the resampling filters; torchaudio's usual 6 lets 0.7 % of white noise's power through above 4 kHz


def add_noise(waveform: Tensor, generator: torch.Generator, snr: float) -> Tensor:
    """White Gaussian noise added to a waveform (S,), `snr` dB below the clip's mean power, its silences included."""
    noise = torch.randn(waveform.shape, generator=generator)  # (S,)
    power = waveform.pow(2).mean() / 10 ** (snr / 10)
    return waveform + noise * (power / noise.pow(2).mean()).sqrt()


def change_speed(waveform: Tensor, generator: torch.Generator, factor: float) -> Tensor:
    """A waveform (S,) played `factor` times as fast, (about S / factor,). By resampling: the pitch moves along, by the same factor."""
    return F.speed(waveform, SAMPLE_RATE, factor)[0]


def telephone(waveform: Tensor, generator: torch.Generator) -> Tensor:
    """A waveform (S,) as a telephone carries it: sampled at 8 kHz, 8 bits a sample by the mu-law, and back to 16 kHz, (S,)."""
    narrow = F.resample(waveform, SAMPLE_RATE, TELEPHONE_RATE, SHARPNESS).clamp(-1, 1)  # (S / 2,)
    narrow = F.mu_law_decoding(F.mu_law_encoding(narrow, MU_LAW_LEVELS), MU_LAW_LEVELS)
    return F.resample(narrow, TELEPHONE_RATE, SAMPLE_RATE, SHARPNESS)[: len(waveform)]


CONDITIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "clean": lambda waveform, generator: waveform,
    **{f"white noise, {snr} dB": functools.partial(add_noise, snr=snr) for snr in (20, 10, 5)},
    **{f"speed {factor}": functools.partial(change_speed, factor=factor) for factor in (0.9, 1.1)},
    "telephone": telephone,
}


def degraded(items: list[dict], degrade: Callable, folder: Path, longest: int) -> dict[str, str]:
    """Write each of the items' clips anew into a folder; returns {clip: its new file}, without those of more than `longest` samples."""
    files = {}
    for i, clip in enumerate(dict.fromkeys(item["audio_filepath"] for item in items)):
        waveform = degrade(read_audio(clip), torch.Generator().manual_seed(i))
        if len(waveform) <= longest:
            files[clip] = str(folder / f"{i:06d}.wav")
            soundfile.write(files[clip], waveform.numpy(), SAMPLE_RATE, subtype="FLOAT")  # 16 bits would add a noise of their own
    return files


def measure(run: Path, path: Path, device: str) -> dict:
    """Error rates and accuracies in percent of a run's two stages, {condition: {...}}; conditions that `path` holds are not done again.

    Raises ManifestError, AudioError: clips cannot be read. WeightsError: the run has no encoder, LM or adapters.
    """
    rows = read_json(path) if path.is_file() else {}
    if rows.keys() >= CONDITIONS.keys():
        return rows
    asr, instruct = (load_manifest(run / f"corpus/{name}_test.json") for name in ("asr", "instruct"))
    first, second = (DIFFA.from_pretrained(run / "whisper", run / "llada", run / stage, device=device).eval() for stage in ("stage1", "stage2"))
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, degrade in tqdm(CONDITIONS.items(), "robustness"):
        if name in rows:
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = degraded(asr, degrade, Path(folder), first.encoder.config.n_samples)
            said, asked = ([item | {"audio_filepath": files[item["audio_filepath"]]} for item in items if item["audio_filepath"] in files]
                           for items in (asr, instruct))  # fmt: skip
            if not said:
                raise AudioError(f"{name}: every clip of {run / 'corpus/asr_test.json'} is longer than the encoder's window")
            heard = StateCache(second, said)
            texts, _ = answer(first, heard, said, THRESHOLD)
            table = questions(second, heard, asked)
        rows[name] = {
            "word_error_rate": word_error_rate(texts, [item["transcription"] for item in said]), "items": len(said),
            "too_long": len(asr) - len(said), "content_mean": table["content_mean"], "voice_mean": table["voice_mean"],
            "accuracy": {kind: row["accuracy"] for kind, row in table.items() if isinstance(row, dict) and "accuracy" in row},
        }  # fmt: skip
        write_json(path, rows)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Error rates on degraded clips.")
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), help="what `make demo` wrote")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        rows = measure(args.run, args.run / "ablations/robustness.json", args.device)
    except (AudioError, ManifestError, ValueError, OSError) as error:
        raise SystemExit(f"robustness.py: {error}") from None
    print(robustness_table(rows))


if __name__ == "__main__":
    main()

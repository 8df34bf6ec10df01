"""Speech by eSpeak NG for the toy corpus: the voices, the engine, and sound files of what it says.

Training and test share no voice. The same text, voice and parameters always give the same samples.

Units: samples are int16 at ESPEAK_RATE in memory, 16-bit WAV at SAMPLE_RATE on disk.
"""

import _ctypes
import ctypes
import random
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio

from encoder import SAMPLE_RATE

ESPEAK_RATE = 22_050  # Hz, of eSpeak's synthesis
LOUDNESS = 0.045  # RMS of a clip, in the middle of the corpus's range

# Made once, because its filters take longer than a clip.
RESAMPLE = torchaudio.transforms.Resample(ESPEAK_RATE, SAMPLE_RATE)

# ---- the voices
# eSpeak's own voices with a clear gender and a human, voiced sound: no whispers, robots or
# children. Reed is left out because he sounds different each time; Marco and AnxiousAndy because
# they need more than the toy encoder's window for a long sentence. Near duplicates (linda and
# belinda, the stephs, the ivens) stay in one split.
REAL_VOICES = {
    ("train", "female"): "Alicia Annie aunty belinda linda f1 f3 f4 steph steph2 steph3".split(),
    ("train", "male"): """Andy Denis Diogo Henrique Hugo Lee Mario Michael Storm adam antonio
        benjamin boris david ed edward edward2 grandpa ian iven iven2 iven3 iven4 john m1 m4 m5 m7
        m8 max michel miguel mike2 norbert pablo paul pedro quincy rob robert victor""".split(),
    ("test", "female"): "Andrea anika f2 f5 grandma".split(),
    ("test", "male"): "Gene Gene2 Mike gustave m2 m3 m6 marcelo sandro travis".split(),
}  # fmt: skip

# Voices of our own, because eSpeak has few. The broad ones are as various as eSpeak's own voices,
# whose formants are each raised by another ratio; without them, a model takes women with odd
# throats for men. Most broad voices are female, since eSpeak has few women: with as many odd men,
# a model takes the women for men. With an accent before it, a longer name would overrun a buffer
# of eSpeak's.
SYNTHETIC_VOICES = {
    (split, gender): [f"{split}-{gender}-{i:02d}" for i in range(70 if split == "train" else 20)]
    for split, gender in REAL_VOICES
}
SYNTHETIC_VOICES["train", "female"] += [f"broad-female-{i:02d}" for i in range(60)]
SYNTHETIC_VOICES["train", "male"] += [f"broad-male-{i:02d}" for i in range(12)]

VOICES = {group: REAL_VOICES[group] + SYNTHETIC_VOICES[group] for group in REAL_VOICES}

# What a synthetic voice is drawn from. pitch: in Hz, where it starts (of a broad voice, its
# middle). tract: formants relative to the usual; short throats have high formants. rise: of the
# pitch, a ratio.
VOICE_RANGES = {
    # broad, gender:    pitch, tract, rise, flutter
    (False, "female"): ((165, 240), (1.08, 1.25), (1.2, 1.6), (0, 8)),
    (False, "male"): ((70, 120), (0.88, 1.02), (1.2, 1.6), (0, 8)),
    (True, "female"): ((165, 270), (0.95, 1.15), (1.2, 2.2), (0, 20)),
    (True, "male"): ((80, 150), (0.88, 1.04), (1.2, 2.2), (0, 20)),
}


def synthetic_voice(name: str, gender: str) -> str:
    """The text of an eSpeak variant file. A voice depends on its name, not on the corpus's seed."""
    rng = random.Random(name)
    broad = name.startswith("broad")
    pitch_range, tract_range, rise_range, flutter_range = VOICE_RANGES[broad, gender]

    pitch = rng.uniform(*pitch_range)
    tract = rng.uniform(*tract_range)

    # Frequency, strength and width of each formant, in percent. Formant 0 is the hum below the
    # others, which no throat shapes. eSpeak's grandpa lacks formants 6 to 8. spread: how far a
    # formant strays from the tract's length.
    top = rng.choice((1, 1, 0.1)) if broad else 1
    spread = 0.15 if broad else 0.04
    formants = []
    for i in range(9):
        scale = (tract if i else 1) * (top if i > 5 else 1)
        frequency = 100 * scale * rng.uniform(1 - spread, 1 + spread)
        formants.append(
            f"formant {i} {frequency:.0f} {rng.randint(75, 120)} {rng.randint(80, 140)}"
        )

    # eSpeak takes the range of the pitch; a broad voice has the drawn pitch in its middle.
    rise = rng.uniform(*rise_range)
    flutter = rng.randint(*flutter_range)
    start = 2 * pitch / (1 + rise) if broad else pitch

    # The least strength at 1,200 and 2,500 Hz: some of eSpeak's own voices are as dull as a broad
    # one may be.
    least_1200 = 20 if broad else 80
    least_2500 = 10 if broad else 60

    lines = [
        "language variant",
        f"name {name}",
        f"gender {gender}",
        f"pitch {start:.0f} {start * rise:.0f}",
        f"flutter {flutter}",
        f"roughness {rng.randint(0, 3)}",
        f"voicing {rng.randint(60, 150)}",
        f"consonants {rng.randint(70, 120)} {rng.randint(70, 120)}",
        f"echo 100 {rng.choice((0, 0, 0, 10, 20))}",
        f"tone 600 {rng.randint(150, 255)} 1200 {rng.randint(least_1200, 200)} "
        f"2500 {rng.randint(least_2500, 200)}",
    ]
    return "\n".join([*lines, *formants, ""])


# ---- the engine
# eSpeak reports progress in arrays of espeak_EVENT: ten integers each, of which the first is the
# type and the sixth the sample. These are the types that count here.
EVENTS = ctypes.POINTER(ctypes.c_int * 10)
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, EVENTS)
LIST_END = 0
WORD = 1
END = 5
LONGEST_PATH = 159  # bytes; eSpeak cuts a longer one, then ends the process


def espeak_release() -> str:
    """The installed release of espeakng-loader, "" if there is none."""
    try:
        return version("espeakng-loader")
    except PackageNotFoundError:
        return ""


def prepare_espeak(folder: Path) -> None:
    """Copy what English needs of eSpeak's data to `folder`, and add the synthetic voices.

    Raises OSError: eSpeak NG is not installed, or does not load, or `folder` is too long for it.
    """
    if len(bytes(folder)) > LONGEST_PATH:
        raise OSError(
            f"{folder}: eSpeak NG finds nothing in paths of more than {LONGEST_PATH} bytes; "
            "set TMPDIR to a shorter folder, such as /tmp"
        )
    try:
        import espeakng_loader

        # Load the library once, to see that it can be.
        installed = Path(espeakng_loader.get_data_path())
        _ctypes.dlclose(ctypes.CDLL(espeakng_loader.get_library_path())._handle)
    except (ImportError, OSError, RuntimeError) as error:
        raise OSError(
            f"eSpeak NG does not load ({error}). Install it: pip install espeakng-loader"
        ) from error

    shutil.copytree(installed / "lang" / "gmw", folder / "lang" / "gmw")
    for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
        shutil.copy(installed / name, folder)

    # eSpeak reads at most 349 voices, so ours replace those that are not used.
    variants = folder / "voices" / "!v"
    variants.mkdir(parents=True)
    for group, names in REAL_VOICES.items():
        for name in names:
            shutil.copy(installed / "voices" / "!v" / name, variants)
        for name in SYNTHETIC_VOICES[group]:
            (variants / name).write_text(synthetic_voice(name, group[1]), "utf-8")


def speak(text: str, voice: str, rate: int, pitch: int, data: Path) -> tuple[np.ndarray, list[int]]:
    """Speak a text; the same arguments always give the same samples.

    Args:
        voice: accent and voice, such as "en-us+f2".
        rate: words a minute. pitch: 0 to 99, as eSpeak counts it.
        data: the folder that `prepare_espeak` has filled.
    Returns:
        int16 samples (S,) at ESPEAK_RATE, and the samples at which each word begins and the last
        one ends. eSpeak takes some pairs of words ("has been") for one.
    Raises:
        OSError: eSpeak does not start, has no such voice, or says nothing.
    """
    import espeakng_loader

    # eSpeak's oscillators run on from one text into the next, so a clip would depend on those
    # before it. Loading the library anew for each clip takes 0.4 ms and resets them.
    engine = ctypes.CDLL(espeakng_loader.get_library_path())
    chunks = []
    marks = []

    # Collects sound and marks; 0 tells eSpeak to continue.
    @CALLBACK
    def receive(samples, count, events):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for event in events:
            if event[0] == LIST_END:
                return 0
            if event[0] in (WORD, END):
                marks.append(event[5])

    encoded = text.encode()
    try:
        # Mode 2: synchronous, all sound goes to the callback.
        sample_rate = engine.espeak_Initialize(2, 0, bytes(data), 0)
        engine.espeak_SetSynthCallback(receive)
        if sample_rate != ESPEAK_RATE or engine.espeak_SetVoiceByName(voice.encode()) != 0:
            raise OSError(f"eSpeak NG cannot start with voice {voice} and the data in {data}")

        # Parameters 1, 2 and 3: rate, volume, pitch. At a quarter of the usual volume no voice is
        # clipped.
        for parameter, value in ((1, rate), (2, 25), (3, pitch)):
            engine.espeak_SetParameter(parameter, value, 0)

        # Its noise is random too: the start has seeded it with the time.
        engine.espeak_ng_SetRandSeed(ctypes.c_long(1))
        size = ctypes.c_size_t(len(encoded) + 1)
        engine.espeak_Synth(encoded, size, 0, 1, 0, 1, None, None)
    finally:
        engine.espeak_Terminate()
        _ctypes.dlclose(engine._handle)
    if not chunks:
        raise OSError(f"eSpeak NG made no sound with voice {voice} of: {text}")
    return np.concatenate(chunks), marks


# ---- sound files
def without_silence(samples: np.ndarray) -> np.ndarray:
    """The samples (S,) of `speak` up to 50 ms after the last sound."""
    level = np.abs(samples.astype(int))
    last = int(np.flatnonzero(level > level.max() / 100)[-1])
    return samples[: last + ESPEAK_RATE // 20]


def to_waveform(samples: np.ndarray, loudness: float = LOUDNESS) -> np.ndarray:
    """Samples (S,) of `speak` as floats of SAMPLE_RATE with this RMS, or less than would clip."""
    waveform = RESAMPLE(torch.from_numpy(samples.astype(np.float32))).numpy()
    gain = loudness / np.sqrt(np.mean(waveform**2))
    return waveform * min(gain, 0.99 / np.abs(waveform).max())


def write_clip(path: Path, samples: np.ndarray, rng: random.Random) -> float:
    """Write samples (S,) of `speak` as a WAV file of SAMPLE_RATE; returns its length in seconds.

    Raises OSError: it cannot be written.
    """
    # A random level, so that it says nothing about the voice; low enough not to clip.
    waveform = to_waveform(samples, rng.uniform(0.03, 0.06))

    try:
        soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
    except soundfile.SoundFileError as error:
        raise OSError(f"{path}: cannot be written ({error})") from error
    return round(len(waveform) / SAMPLE_RATE, 3)

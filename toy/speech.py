"""The toy corpus, made from nothing: a small grammar (grammar.py) writes sentences and eSpeak NG speaks them.

It speaks them in many voices, accents, speeds and pitches. Training and test share neither a sentence nor a voice.

    python -m corpora.manifests toy --out runs/toy/corpus --seed 0 --train 6000 --test 400

writes OUT/audio/{train,test}/*.wav (16 kHz) and four manifests, JSON lists with one item a line: asr_{train,test}.json
(transcribe the clip) and instruct_{train,test}.json (answer a question about it).
"""

import _ctypes
import contextlib
import ctypes
import functools
import json
import multiprocessing
import random
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from tqdm import tqdm

from data import write_manifest
from toy.grammar import (
    ACCENTS, PITCHES, SPEEDS, TEMPLATES, TRANSCRIBE, instructions, random_attributes, random_sentence, seed_transcript,
    training_kinds,
)  # fmt: skip

SAMPLE_RATE = 16_000  # Hz, of the files we write
ESPEAK_RATE = 22_050  # Hz, of eSpeak's synthesis
MAX_SECONDS = 3.15  # the toy encoder's context is 3.2 s
RESAMPLE = torchaudio.transforms.Resample(ESPEAK_RATE, SAMPLE_RATE)  # made once: its filters take longer than a clip

# ---- the voices
# eSpeak's own ones with a clear gender and a human, voiced sound: no whispers, robots, children; without Reed, who
# sounds different each time, and Marco and AnxiousAndy, who need more than MAX_SECONDS for a long sentence. Near
# duplicates (linda and belinda, the stephs, the ivens) stay on one side.
REAL_VOICES = {
    ("train", "female"): "Alicia Annie aunty belinda linda f1 f3 f4 steph steph2 steph3",
    ("train", "male"): """Andy Denis Diogo Henrique Hugo Lee Mario Michael Storm adam antonio
        benjamin boris david ed edward edward2 grandpa ian iven iven2 iven3 iven4 john m1 m4 m5 m7 m8 max michel
        miguel mike2 norbert pablo paul pedro quincy rob robert victor""",
    ("test", "female"): "Andrea anika f2 f5 grandma",
    ("test", "male"): "Gene Gene2 Mike gustave m2 m3 m6 marcelo sandro travis",
}
MADE_VOICES = {  # made up by us; with an accent before it, a longer name overruns a buffer of eSpeak's
    group: [f"{'-'.join(group)}-{i:02d}" for i in range(70 if "train" in group else 20)] for group in REAL_VOICES}
# As various as eSpeak's own, whose formants are raised each by another share: else women with odd throats are taken for men.
# More of women, since eSpeak has few: with as many men as odd, it is the women who are mistaken.
for gender, number in (("female", 60), ("male", 12)):
    MADE_VOICES["train", gender] += [f"broad-{gender}-{i:02d}" for i in range(number)]
MADE_RANGES = {  # pitch in Hz (where it starts; of a broad voice its middle), formants against the usual, rise, flutter
    ("plain", "female"): ((165, 240), (1.08, 1.25), (1.2, 1.6), (0, 8)),  # short throats, high formants
    ("plain", "male"): ((70, 120), (0.88, 1.02), (1.2, 1.6), (0, 8)),
    ("broad", "female"): ((165, 270), (0.95, 1.15), (1.2, 2.2), (0, 20)),
    ("broad", "male"): ((80, 150), (0.88, 1.04), (1.2, 2.2), (0, 20)),
}


def made_voice(name: str, gender: str) -> str:
    """The text of an eSpeak variant file for a made-up voice. It follows from the name, whatever the corpus's seed."""
    rng, broad = random.Random(name), name.startswith("broad")
    pitches, tracts, rises, flutters = MADE_RANGES["broad" if broad else "plain", gender]
    pitch, tract = rng.uniform(*pitches), rng.uniform(*tracts)
    top = rng.choice((1, 1, 0.1)) if broad else 1  # formants 6 to 8, which eSpeak's grandpa lacks
    apart = 0.15 if broad else 0.04  # how far each formant strays from the tract's length
    middle, high = (20, 10) if broad else (80, 60)  # least strength at 1,200 and 2,500 Hz: some of eSpeak's are as dull as that
    formants = [  # frequency, strength and width in percent; number 0 is the hum below them, which no throat shapes
        f"formant {i} {100 * (tract if i else 1) * (top if i > 5 else 1) * rng.uniform(1 - apart, 1 + apart):.0f} {rng.randint(75, 120)} "
        f"{rng.randint(80, 140)}" for i in range(9)]
    rise, flutter = rng.uniform(*rises), rng.randint(*flutters)
    start = 2 * pitch / (1 + rise) if broad else pitch
    return "\n".join([
        "language variant", f"name {name}", f"gender {gender}", f"pitch {start:.0f} {start * rise:.0f}",
        f"flutter {flutter}", f"roughness {rng.randint(0, 3)}", f"voicing {rng.randint(60, 150)}",
        f"consonants {rng.randint(70, 120)} {rng.randint(70, 120)}", f"echo 100 {rng.choice((0, 0, 0, 10, 20))}",
        f"tone 600 {rng.randint(150, 255)} 1200 {rng.randint(middle, 200)} 2500 {rng.randint(high, 200)}",
        *formants, ""])


# ---- the engine
# eSpeak reports its progress in arrays of espeak_EVENT: ten integers each, the first its type, the sixth the sample.
EVENTS = ctypes.POINTER(ctypes.c_int * 10)
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, EVENTS)
LIST_END, WORD, END = 0, 1, 5  # types of event


def prepare_espeak(folder: Path) -> tuple[str, Path]:
    """Copies what English needs of eSpeak's data to folder and adds our voices. Returns paths of library and data."""
    try:
        import espeakng_loader

        library, data = espeakng_loader.get_library_path(), Path(espeakng_loader.get_data_path())
        _ctypes.dlclose(ctypes.CDLL(library)._handle)
    except (ImportError, OSError, RuntimeError) as error:
        raise SystemExit(f"eSpeak NG does not load ({error}). Install it: pip install espeakng-loader") from error
    shutil.copytree(data / "lang" / "gmw", folder / "lang" / "gmw")
    for name in ("phondata", "phonindex", "phontab", "intonations", "en_dict"):
        shutil.copy(data / name, folder)
    variants = folder / "voices" / "!v"  # with ours in place of those we do not use: eSpeak reads at most 349
    variants.mkdir(parents=True)
    for split, gender in REAL_VOICES:
        for name in REAL_VOICES[split, gender].split():
            shutil.copy(data / "voices" / "!v" / name, variants)
        for name in MADE_VOICES[split, gender]:
            (variants / name).write_text(made_voice(name, gender))
    return library, folder


def speak(text: str, voice: str, rate: int, pitch: int, library: str, data: Path) -> tuple[np.ndarray, list[int]]:
    """Speaks text with a voice such as "en-us+f2"; the same arguments always give the same samples.

    rate is in words a minute, pitch 0 to 99 as eSpeak counts them; library and data come from prepare_espeak. Returns
    int16 samples at ESPEAK_RATE, and the samples at which each word begins and the last one ends; eSpeak takes some pairs
    ("has been") for one word.
    """
    # eSpeak's oscillators run on from one text into the next, so a clip would depend on those before it. Loading the
    # library anew for each clip takes 0.4 ms and forgets all that.
    engine = ctypes.CDLL(library)
    chunks, marks = [], []

    @CALLBACK
    def receive(samples, count, events):
        if count > 0:
            chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        for event in events:
            if event[0] in (WORD, END):
                marks.append(event[5])
            if event[0] == LIST_END:
                return 0

    try:
        rate_hz = engine.espeak_Initialize(2, 0, bytes(data), 0)  # 2: synchronous, all sound to the callback
        engine.espeak_SetSynthCallback(receive)
        if rate_hz != ESPEAK_RATE or engine.espeak_SetVoiceByName(voice.encode()) != 0:
            raise RuntimeError(f"eSpeak NG cannot start with the voice {voice} and the data in {data}")
        for parameter, value in ((1, rate), (2, 25), (3, pitch)):  # a quarter of the usual volume clips no voice
            engine.espeak_SetParameter(parameter, value, 0)
        engine.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the noise too: starting up has seeded it with the time
        engine.espeak_Synth(text.encode(), ctypes.c_size_t(len(text.encode()) + 1), 0, 1, 0, 1, None, None)
    finally:
        engine.espeak_Terminate()
        _ctypes.dlclose(engine._handle)
    return np.concatenate(chunks), marks


def without_silence(samples: np.ndarray) -> np.ndarray:
    """What speak returns up to 50 ms after its last sound."""
    level = np.abs(samples.astype(int))
    return samples[: int(np.flatnonzero(level > level.max() / 100)[-1]) + ESPEAK_RATE // 20]


def write_clip(path: Path, samples: np.ndarray, rng: random.Random) -> float:
    """Write samples (ESPEAK_RATE) as a WAV file of SAMPLE_RATE, at a level drawn from rng; returns its seconds."""
    waveform = RESAMPLE(torch.from_numpy(samples.astype(np.float32))).numpy()
    gain = rng.uniform(0.03, 0.06) / np.sqrt(np.mean(waveform**2))  # a level that says nothing about the voice
    waveform *= min(gain, 0.99 / np.abs(waveform).max())  # and that does not clip
    soundfile.write(path, waveform, SAMPLE_RATE, subtype="PCM_16")
    return round(len(waveform) / SAMPLE_RATE, 3)


@contextlib.contextmanager
def processes() -> Iterator[ProcessPoolExecutor]:
    """One process a core, one thread each. Raises SystemExit when one dies, as C code may; a multiprocessing.Pool would wait for ever."""
    pool = ProcessPoolExecutor(None, multiprocessing.get_context("fork"), torch.set_num_threads, (1,))
    try:
        yield pool
    except BrokenProcessPool:
        raise SystemExit("a process that speaks or reads clips broke down, or memory ran out; free some, then run the same command") from None
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C nothing more is begun


# ---- the toy corpus
def toy_clip(index: int, split: str, out: Path, seed: int, library: str, data: Path) -> tuple[dict, list[dict]]:
    """Draws, speaks and writes clip number index of a split. Returns its item for asr and those for instruct."""
    rng = random.Random(f"{seed}/{split}/{index}")  # its own, so no clip depends on how many there are
    attributes = random_attributes(rng)
    group = split, attributes.gender
    voices = REAL_VOICES[group].split() + MADE_VOICES[group]
    length = rng.choice(list(TEMPLATES))
    for attempt in range(200):
        # A clip that is too long gets other words and another rate of the same range, in the end another voice, but keeps
        # its number of words and its attributes: else speed could be told from the count.
        voice = rng.choice(voices) if attempt % 20 == 0 else voice
        sentence = random_sentence(rng, held_out=split == "test", length=length)
        rate, pitch = rng.randint(*SPEEDS[attributes.speed]), rng.randint(*PITCHES[attributes.pitch])
        samples, marks = speak(sentence.text, f"{ACCENTS[attributes.accent]}+{voice}", rate, pitch, library, data)
        if len(marks) != length + 1:
            raise RuntimeError(f"eSpeak NG marked {len(marks) - 1} words in: {sentence.text}")
        samples = without_silence(samples)
        if len(samples) <= MAX_SECONDS * ESPEAK_RATE:
            break
    else:
        raise RuntimeError(f"no {attributes.gender} voice can say {length} words in {MAX_SECONDS} s")
    path = f"audio/{split}/{index:06d}.wav"
    seconds = write_clip(out / path, samples, rng)
    times = [round(min(mark / ESPEAK_RATE, seconds), 3) for mark in marks]
    item = {"audio_id": f"toy-{split}-{index:06d}", "audio_filepath": path, "input": TRANSCRIBE,
            "transcription": sentence.text, "target": sentence.text, "dataset": "toy", "duration": seconds,
            "seed_transcript": seed_transcript(sentence, attributes, seconds)}
    pairs = instructions(sentence, attributes, rng)
    kinds = training_kinds(pairs, rng) if split == "train" else pairs
    drawn = {**asdict(attributes), "voice": voice, "rate": rate, "pitch_parameter": pitch}
    return ({**item, "attributes": drawn, "words": list(zip(sentence.text.split(), times, times[1:]))},
            [{**item, "input": pairs[kind][0], "target": pairs[kind][1], "kind": kind} for kind in kinds])


def make_toy(out: Path, seed: int = 0, train: int = 6000, test: int = 400) -> bool:
    """Makes the toy corpus in the folder out, with so many clips to train and to test on: same seed, same files, bit
    for bit. Returns False if the finished corpus is there already; another corpus is left alone, with an error.
    """
    arguments = {"corpus": "toy", "seed": seed, "train": train, "test": test}
    record = out / "corpus.json"  # written last, so it says that all the rest is complete
    if record.exists():
        if json.loads(record.read_text()) == arguments:
            print(f"{out} holds this corpus already.")
            return False
        raise SystemExit(f"{out} holds another corpus, {record.read_text().strip()}. Choose another --out.")
    manifests = {}
    with processes() as pool, tempfile.TemporaryDirectory() as temporary:
        library, data = prepare_espeak(Path(temporary))
        for split, count in (("train", train), ("test", test)):
            (out / "audio" / split).mkdir(parents=True, exist_ok=True)
            clip = functools.partial(toy_clip, split=split, out=out, seed=seed, library=library, data=data)
            clips = list(tqdm(pool.map(clip, range(count), chunksize=8), f"speaking {split}", count, unit=" clips"))
            manifests[f"asr_{split}.json"] = [asr for asr, _ in clips]
            manifests[f"instruct_{split}.json"] = [item for _, items in clips for item in items]
    for name, items in manifests.items():  # after all the audio, so a killed run leaves no half corpus
        write_manifest(out / name, items)
    record.write_text(json.dumps(arguments) + "\n")
    return True

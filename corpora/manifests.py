"""Manifests of public corpora as they lie on disk once unpacked.

    python -m corpora.manifests librispeech ROOT --out manifests [--subset dev-clean] [--download]
    python -m corpora.manifests vctk ROOT --out manifests --held-out 5

The first writes OUT/librispeech-dev-clean.json. With --held-out there are OUT/vctk_train.json and
OUT/vctk_test.json, the latter with that percentage of the speakers. Each item has a *seed
transcript*: one line with all that is known of the clip. `python -m corpora.targets` makes targets
from it.
"""

import argparse
import collections
import functools
import json
import math
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from checkpoints.command_line import one_line_errors
from checkpoints.files import check_writable, whole_file
from corpora.measure import measured, seed_transcript
from corpora.readers import READERS, Clip, CorpusError
from corpora.workers import map_in_processes
from data import TRANSCRIBE, AudioError, read_audio
from encoder import SAMPLE_RATE


def write_manifest(path: Path, items: list[dict]) -> None:
    """Write a manifest, one item a line. The file appears whole or not at all."""
    lines = [json.dumps(item, separators=(",", ":")) for item in items]
    with whole_file(path) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


def transcription_item(
    *, audio_id: str, path: str, words: str, dataset: str, seconds: float, seed: str
) -> dict:
    """A manifest item that asks for a clip's words. seed: its seed transcript."""
    return {
        "audio_id": audio_id,
        "audio_filepath": path,
        "input": TRANSCRIBE,
        "transcription": words,
        "target": words,
        "dataset": dataset,
        "duration": seconds,
        "seed_transcript": seed,
    }


def corpus_item(clip: Clip, corpus: str) -> dict | str:
    """A clip's manifest item; if the clip cannot be read, the reason."""
    # A manifest is UTF-8, and could not name the file.
    name = str(clip.path).encode(errors="backslashreplace").decode()
    if name != str(clip.path):
        return f"{name}: its name is not UTF-8; rename it"
    try:
        waveform = read_audio(clip.path)  # (S,)
    except AudioError as error:
        return str(error)
    seconds = len(waveform) / SAMPLE_RATE
    if round(seconds, 3) == 0:
        return f"{clip.path}: lasts less than a millisecond"

    # What the corpus says has precedence over what is measured.
    known = {name: value for name, value in clip.attributes.items() if value}
    attributes = measured(waveform, clip.words, known.get("Gender", "")) | known

    item = transcription_item(
        audio_id=f"{corpus}-{clip.id}",
        path=str(clip.path.resolve()),
        words=clip.words,
        dataset=corpus,
        seconds=round(seconds, 3),
        seed=seed_transcript(clip.words, attributes, seconds),
    )
    return item | {"speaker": clip.speaker, "attributes": attributes}


def make_manifests(clips: Iterable[Clip], corpus: str, out: Path, held_out: float = 0.0) -> None:
    """Write the manifests of a corpus's clips; print what was written and which clips were skipped.

    Args:
        corpus: its name, which begins the names of files and items.
        held_out: percentage of the speakers that go to the test manifest; 0 for one manifest.
    Raises:
        CorpusError: there is no clip, none can be read, or one manifest would be empty.
        OSError: a manifest cannot be written.
    """
    # A speaker's name decides between training and test, so no voice is in both.
    files = collections.defaultdict(list)
    for clip in clips:
        name = clip.speaker.encode(errors="surrogatepass")
        part = "_test" if zlib.crc32(name) % 1000 < 10 * held_out else "_train"
        files[out / f"{corpus}{part if held_out else ''}.json"].append(clip)

    # Before all clips are read: will there be something to write, and a place for it?
    if not files:
        raise CorpusError(f"{corpus}: no clip found; --help shows the layout")
    if held_out and len(files) == 1:
        (name,) = files
        raise CorpusError(
            f"--held-out {held_out:g} takes all speakers to {name.name}; choose another percentage"
        )
    out.mkdir(parents=True, exist_ok=True)
    for path in files:
        check_writable(path)

    # Clips that cannot be read are left out; the first reasons are enough to find the cause.
    items = {}
    for path, found in files.items():
        item_of = functools.partial(corpus_item, corpus=corpus)
        results = map_in_processes(item_of, found, path.stem)
        items[path] = [result for result in results if isinstance(result, dict)]
        skipped = [result for result in results if isinstance(result, str)]
        for reason in skipped[:20]:
            print(f"skipped: {reason}", file=sys.stderr)  # it takes names in any alphabet
        print(f"{path.stem}: {len(skipped)} clips skipped")
        if not items[path]:
            raise CorpusError(f"{path.stem}: none of its {len(found)} clips can be read")

    for path in items:
        write_manifest(path, items[path])
        print(f"{len(items[path])} items in {path}")


def percentage(text: str) -> float:
    """The value of an option in percent. Raises ArgumentTypeError: it is not 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"must be 0 to 100, not {text!r}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    # A subcommand for each corpus, whose help is the layout that its reader expects.
    commands = parser.add_subparsers(required=True, dest="corpus")
    for reader in READERS:
        command = commands.add_parser(reader.__name__)
        command.set_defaults(reader=reader)
        option = command.add_argument
        option("root", type=Path, metavar="ROOT", help=reader.__doc__)
        option("--out", type=Path, required=True, help="folder of the manifests")
        option(
            "--held-out", type=percentage, default=0.0, help="percent of the speakers for a test"
        )
        if reader.__name__ == "librispeech":
            option("--subset", default="train-clean-100", help="dev-clean, test-clean, ...")
            option("--download", action="store_true", help="fetch it first")
    args = parser.parse_args()

    with one_line_errors("python -m corpora.manifests"):
        name = args.corpus
        options = {}
        if name == "librispeech":
            name += f"-{args.subset}"
            options = {"subset": args.subset, "download": args.download}
        make_manifests(args.reader(args.root, **options), name, args.out, args.held_out)


if __name__ == "__main__":
    main()

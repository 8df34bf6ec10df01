"""Manifests of public corpora as they lie on disk once unpacked.

    python -m corpora.manifests librispeech ROOT --out manifests [--subset dev-clean] [--download]
    python -m corpora.manifests vctk ROOT --out manifests --held-out 5

The first writes OUT/librispeech-dev-clean.json. With --held-out there are OUT/vctk_train.json and
OUT/vctk_test.json, the latter with about that percentage of the speakers. Each item has a *seed
transcript*: one line with all that is known of the clip. `python -m corpora.targets` makes targets
from it.
"""

import argparse
import collections
import functools
import json
import math
import re
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path

from checkpoints.command_line import one_line_errors
from checkpoints.files import check_writable, whole_file
from corpora.layout import Clip, CorpusError, Missing
from corpora.measure import measured, seed_transcript
from corpora.readers import READERS
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


def corpus_item(clip: Clip, corpus: str) -> dict | Missing:
    """A clip's manifest item; if the clip cannot be read, the reason."""
    # A manifest is UTF-8, and could not name the file.
    name = str(clip.path).encode(errors="backslashreplace").decode()
    if name != str(clip.path):
        return Missing("its name is not UTF-8; rename it", name)
    try:
        waveform = read_audio(clip.path)  # (S,)
    except AudioError as error:
        return Missing(str(error).removeprefix(f"{name}: "), name)
    seconds = len(waveform) / SAMPLE_RATE
    if round(seconds, 3) == 0:
        return Missing("lasts less than a millisecond", name)

    # What the corpus says has precedence over what is measured.
    measures = measured(waveform, clip.words, clip.attributes.get("Gender", ""))
    attributes = measures | clip.attributes

    item = transcription_item(
        audio_id=f"{corpus}-{clip.id}",
        path=str(clip.path.resolve()),
        words=clip.words,
        dataset=corpus,
        seconds=round(seconds, 3),
        seed=seed_transcript(clip.words, attributes, seconds),
    )
    return item | {"speaker": clip.speaker, "attributes": attributes}


def missing_lines(missing: list[Missing]) -> list[str]:
    """Reasons, each with its number and an example; details in parentheses do not count."""
    groups = collections.defaultdict(list)
    for found in missing:
        groups[re.sub(r" \(.*\)", "", found.reason)].append(found.name)
    ranked = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    return [f"  {len(names)}: {reason}, such as {names[0]}" for reason, names in ranked]


def held_out_rank(clip: Clip) -> int:
    """Ten times the percentage above which --held-out takes a clip to the test.

    It depends on the speaker's name alone (or on that of the session or dialogue), so no voice is
    in both manifests, and a speaker stays where it is when others come or go.
    """
    name = (clip.held_out_with or clip.speaker).encode(errors="surrogatepass")
    return zlib.crc32(name) % 1000


def split_clips(
    found: Iterable[Clip | Missing], corpus: str, held_out: float
) -> tuple[dict[str, list[Clip]], list[Missing]]:
    """The clips of each manifest by its name, and what is missing.

    Raises CorpusError: there is no clip, or one manifest would be empty.
    """
    # Every clip goes to one manifest, and no id to two clips.
    files = collections.defaultdict(list)
    missing = []
    ranks = []
    ids = set()
    for clip in found:
        if isinstance(clip, Missing):
            missing.append(clip)
            continue
        if clip.id in ids:
            missing.append(Missing("a second clip with the id of another", str(clip.path)))
            continue

        ids.add(clip.id)
        rank = held_out_rank(clip)
        ranks.append(rank)
        part = "_test" if rank < 10 * held_out else "_train"
        files[f"{corpus}{part if held_out else ''}"].append(clip)

    # Will there be something to write?
    if not files:
        reasons = "\n".join(["", *missing_lines(missing)])
        raise CorpusError(f"{corpus}: no clip found; --help shows the layout{reasons}")
    if held_out and len(files) == 1:
        (name,) = files
        advice = "there is only one speaker"
        if min(ranks) < max(ranks):
            bounds = f"above {min(ranks) / 10:g}, and at most {max(ranks) / 10:g}"
            advice = f"choose a percentage {bounds}"
        raise CorpusError(f"--held-out {held_out:g} takes all speakers to {name}; {advice}")
    return files, missing


def make_manifests(
    found: Iterable[Clip | Missing], corpus: str, out: Path, held_out: float = 0.0
) -> None:
    """Write the manifests of a corpus's clips; print what was written, skipped and missing.

    Args:
        corpus: its name, which begins the names of files and items.
        held_out: percentage of the speakers that go to the test manifest; 0 for one manifest.
    Raises:
        CorpusError: there is no clip, none can be read, or one manifest would be empty.
        OSError: a manifest cannot be written.
    """
    # Before all clips are read: what there is to write, and a place for it.
    files, missing = split_clips(found, corpus, held_out)
    if missing:
        print("\n".join([f"{corpus}: missing or left out", *missing_lines(missing)]))
    out.mkdir(parents=True, exist_ok=True)
    for name in files:
        check_writable(out / f"{name}.json")

    # Clips that cannot be read are left out; the first reasons are enough to find the cause.
    items = {}
    for name, clips in files.items():
        item_of = functools.partial(corpus_item, corpus=corpus)
        results = map_in_processes(item_of, clips, name)
        items[name] = [result for result in results if isinstance(result, dict)]
        skipped = [result for result in results if isinstance(result, Missing)]
        for clip in skipped[:20]:
            # The standard error takes names in any alphabet.
            print(f"skipped: {clip.name}: {clip.reason}", file=sys.stderr)
        print("\n".join([f"{name}: {len(skipped)} clips skipped", *missing_lines(skipped)]))
        if not items[name]:
            raise CorpusError(f"{name}: none of its {len(clips)} clips can be read")

    for name in items:
        path = out / f"{name}.json"
        write_manifest(path, items[name])
        print(f"{len(items[name])} items in {path}")


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

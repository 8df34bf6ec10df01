"""Transcripts as figures: WER of all, of speakers and of lengths, and the worst clips."""

import collections
from collections.abc import Callable

from evaluation.wer import WordErrors, bootstrap_interval, normalize_english, summed, word_errors

WORST = 10  # clips and speakers that are shown
LENGTHS = (2, 5, 10, 15, 20, 30)  # seconds; bounds of the rows by length


def errors_by(rows: list[dict], errors: list[WordErrors], key: Callable) -> dict[str, list]:
    """The errors of clips, gathered by a key of their rows."""
    groups = collections.defaultdict(list)
    for row, found in zip(rows, errors, strict=True):
        groups[key(row)].append(found)
    return groups


def errors_line(name: str, errors: WordErrors) -> str:
    """A line of a table; without a word there is no rate."""
    rate = f"{errors.rate:8.2f}" if errors.words else "       -"
    kinds = f"{errors.substitutions:8} {errors.deletions:8} {errors.insertions:8}"
    return f"{name[:40]:<40} {rate} {errors.words:8} {kinds}"


def total_lines(name: str, rows: list[dict], errors: list[WordErrors]) -> list[str]:
    """The WER of all clips, and 95 % of those of resampled clips and of resampled speakers."""
    total = summed(errors)
    lines = [errors_line(name, total)]
    if not total.words:
        return lines

    # Texts of one speaker are not independent, so whole speakers give an interval of their own.
    low, high = bootstrap_interval(errors)
    interval = f"{low:.2f} to {high:.2f} (clips resampled)"
    speakers = errors_by(rows, errors, lambda row: row["speaker"] or row["id"])
    if 1 < len(speakers) < len(rows):
        low, high = bootstrap_interval([summed(group) for group in speakers.values()])
        interval += f", {low:.2f} to {high:.2f} (speakers resampled)"
    return [*lines, f"    95 % interval: {interval}"]


def length_name(seconds: float) -> str:
    """The row by length to which a clip belongs."""
    upper = next((f"up to {bound} s" for bound in LENGTHS if seconds <= bound), None)
    return upper or f"over {LENGTHS[-1]} s"


def worst_lines(rows: list[dict], errors: list[WordErrors]) -> list[str]:
    """The clips with the most word errors."""
    # By number, not by rate: in a clip of one word, one error would be 100 %.
    ranked = sorted(zip(rows, errors), key=lambda pair: -pair[1].total)
    lines = []
    for row, found in ranked[:WORST]:
        if not found.total:
            break
        lines += [
            f"  errors: {found.total}, words: {found.words}, clip: {row['id']}",
            f"    reference: {row['reference']}",
            f"    answer:    {row['text']}",
        ]
    return ["", "most errors (normalised)", *lines] if lines else []


def counted_lines(rows: list[dict], compared: int) -> list[str]:
    """What stands behind the figures: clips, those left out, and those that were not whole."""
    unread = [row for row in rows if row["text"] is None]
    lines = [f"{len(rows)} clips of {sum(row['duration'] for row in rows):,.0f} s"]
    lines[0] += f", {compared} of them compared"

    # What to know before the figures are believed.
    counts = {
        "without a reference": sum(not row["reference"].split() for row in rows),
        "cannot be read": len(unread),
        "longer than the encoder's window: only its seconds were heard": sum(
            row.get("cut") is True for row in rows
        ),
        "with an answer that filled its whole --length": sum(
            row.get("ended") is False for row in rows
        ),
    }
    lines += [f"  {n} {what}" for what, n in counts.items() if n]
    return lines + [f"    {row.get('problem')}" for row in unread[:WORST]]


def report_lines(rows: list[dict]) -> list[str]:
    """The figures of transcripts, as text.

    Clips without a reference, or that cannot be read, are counted and not compared. After
    normalisation a reference may hold no word; extra words then count as errors all the same.

    rows: as evaluation.transcribe writes them.
    """
    compared = [row for row in rows if row["text"] is not None and row["reference"].split()]
    lines = counted_lines(rows, len(compared))
    if not compared:
        return [*lines, "no clip has both a reference and an answer: no word error rate"]

    # As it stands, and normalised.
    plain = [word_errors(row["text"], row["reference"]) for row in compared]
    normalised = [
        word_errors(normalize_english(row["text"]), normalize_english(row["reference"]))
        for row in compared
    ]
    heading = f"{'':<40} {'WER':>8} {'words':>8} {'subst':>8} {'deleted':>8} {'inserted':>8}"
    lines += ["", heading]
    lines += total_lines("as it stands", compared, plain)
    lines += total_lines("Whisper's normalisation of English", compared, normalised)

    # Where the errors are, after normalisation.
    lengths = errors_by(compared, normalised, lambda row: length_name(row["duration"]))
    lines += ["", "by length (normalised)"]
    for name in (*map(length_name, LENGTHS), length_name(float("inf"))):
        if name in lengths:
            lines.append(errors_line(name, summed(lengths[name])))

    groups = errors_by(compared, normalised, lambda row: row["speaker"])
    speakers = {speaker: summed(group) for speaker, group in groups.items() if speaker}
    if speakers:
        lines += ["", f"by speaker (normalised), the worst of {len(speakers)}"]
        worst = sorted(speakers, key=lambda s: -speakers[s].total / max(speakers[s].words, 1))
        lines += [errors_line(speaker, speakers[speaker]) for speaker in worst[:WORST]]
    return lines + worst_lines(compared, normalised)

"""Find the sound that a decoder left out without an error.

libsndfile reads the first of several joined files, believes the length that it guesses for an MP3
of variable rate, and takes a file that was cut off for a shorter one.

Units: n counts samples of one channel.
"""

import mmap
import re

UNKNOWN = 2**62  # libsndfile gives about 2^63 samples where a file does not know its length
STREAMED = 0x7FFF0000  # sizes in the headers of a WAV that was written to a pipe are above
JOINED = "several files joined into one, of which only the first can be read; split it"
NO_INDEX = (
    "an MP3 of variable rate without an index, or several joined, of which a part would be lost; "
    "convert it: ffmpeg -i IN.mp3 OUT.wav"
)
MOST_BYTES = 2**28  # of an MP3 that is given an index; an hour has fewer
INCOMPLETE = "cut off: its end is missing; fetch or record it again"

# MPEG audio of layer III: kbit/s by index, Hz by index; version 1, then versions 2 and 2.5.
BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8000)}


def missing_sound(sound, file, n: int) -> str:
    """What sound is missing, or "", once a decoder has come to its end.

    Args:
        sound: the SoundFile. file: the same file, open for binary reading. n: samples decoded.
    """
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if sound.format == "MP3":
            return missing_in_mp3(data, sound.frames, n)
        if sound.format == "OGG":
            rate = 48_000 if sound.subtype == "OPUS" else sound.samplerate
            problem = missing_in_ogg(data, rate, n / sound.samplerate)
            if problem:
                return problem
        if sound.format == "FLAC" and len(re.findall(rb"fLaC\0\0\0\x22", data)) > 1:
            return JOINED

    # libsndfile's log says where a header promises more bytes than the file holds.
    log = sound.extra_info
    promised = re.search(r"^ *(?:data|riff|SSND|Data Size) *: (\d+) \(should be", log, re.MULTILINE)
    is_short = (promised and int(promised[1]) < STREAMED) or "truncated file" in log
    return INCOMPLETE if is_short or n < sound.frames < UNKNOWN else ""


def missing_in_mp3(data, n_promised: int, n: int) -> str:
    """Compare decoded samples with the frames in the file."""
    _, n_frames, n_indices, frame = count_mp3_frames(data)
    slack = 5 * frame  # what an encoder adds at both ends is not decoded
    if n_indices > 1:
        return JOINED
    if n_frames * frame > n + slack:
        return NO_INDEX

    # Without an index, the promised length is a guess.
    return INCOMPLETE if n_indices and n_promised > n + slack else ""


def mp3_frame(data, at: int) -> tuple[int, int]:
    """Bytes and samples of the MP3 frame whose header is here; (0, 0) if there is none."""
    header = data[at : at + 4]
    if len(header) < 4 or header[0] != 0xFF or header[1] & 0xE6 != 0xE2:
        return 0, 0
    version = header[1] >> 3 & 3
    bitrate = header[2] >> 4
    rate = header[2] >> 2 & 3
    if version == 1 or bitrate in (0, 15) or rate == 3:
        return 0, 0

    samples = 1152 if version == 3 else 576
    bits = 1000 * BITRATES[version != 3][bitrate]
    padding = header[2] >> 1 & 1
    return samples // 8 * bits // RATES[version][rate] + padding, samples


def with_index(file) -> bytes | None:
    """An MP3 with an index (a Xing frame) that gives its number of frames, so that all are decoded.

    file: open for binary reading. None: it has an index, or is too large for a copy in memory.
    """
    file.seek(0)
    data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        return None
    first, n_frames, n_indices, _ = count_mp3_frames(data)
    if n_indices or not n_frames:
        return None

    # The header of the first frame, at a bit rate with room for the index and without a checksum.
    header = bytearray(data[first : first + 4])
    header[1] |= 1
    header[2] = 0x90 | header[2] & 0x0C
    is_mono = header[3] >> 6 == 3
    if header[1] >> 3 & 3 == 3:
        side = 17 if is_mono else 32
    else:
        side = 9 if is_mono else 17
    index = bytes(header) + bytes(side) + b"Xing\0\0\0\1" + n_frames.to_bytes(4, "big")
    size, _ = mp3_frame(index, 0)
    return index.ljust(size, b"\0") + data[first:]


def count_mp3_frames(data) -> tuple[int, int, int, int]:
    """Where the first frame is; frames with sound; frames that are an index (Xing, Info or VBRI);
    and samples of a frame.
    """
    # A tag before the sound gives its length in bytes of seven bits.
    at = 0
    if data[:3] == b"ID3":
        sizes = data[6:10]
        at = 10 + (sizes[0] << 21 | sizes[1] << 14 | sizes[2] << 7 | sizes[3])

    first = 0
    n_frames = 0
    n_indices = 0
    samples = 0
    in_step = False  # the frame before ended here
    while 0 <= at < len(data) - 4:
        size, n = mp3_frame(data, at)

        # Two bytes that look like a frame are one if another follows.
        if not size or not (in_step or mp3_frame(data, at + size)[0]):
            in_step = False
            at = data.find(b"\xff", at + 1)
            continue

        if not n_frames + n_indices:
            first = at
        is_index = re.search(rb"Xing|Info|VBRI", data[at : at + 44])
        n_indices += bool(is_index)
        n_frames += not is_index
        samples = n
        in_step = True
        at += size
    return first, n_frames, n_indices, samples


def missing_in_ogg(data, rate: int, seconds: float) -> str:
    """Walk the pages: one stream begins at the start, and its last page ends the file.

    rate: of the time that pages carry. seconds: decoded.
    """
    at = 0
    flags = 2
    end = 0  # time at the end of a page, in samples
    while data[at : at + 4] == b"OggS" and at + 27 <= len(data):
        is_first = data[at + 5] & 2
        if is_first and not flags & 2:
            return JOINED
        flags = data[at + 5]
        end = int.from_bytes(data[at + 6 : at + 14], "little", signed=True)
        n_segments = data[at + 26]
        at += 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])

    is_whole = flags & 4 and at <= len(data)
    if is_whole and end / rate > seconds + 0.1:
        return "damaged: a part cannot be decoded; fetch or record it again"
    return "" if is_whole else INCOMPLETE

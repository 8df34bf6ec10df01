"""MP3 and OGG files of which libsndfile would return only a part.

An MP3 file has no length of its own. libsndfile takes it from a table in the first frame, or
guesses it from the first frame's bitrate: of a variable bitrate without a table, and of joined
files, it returns the beginning only. Of several OGG streams in one file it returns the first.
"""

# MP3 frame headers (ISO 11172-3): kbit/s by index, layer III of MPEG-1 and of MPEG-2 and 2.5.
BITRATES = {
    3: (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    2: (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}
STREAM_BEGINS = 2  # bit of an OGG page's flags


def mp3_seconds(data: bytes) -> float:
    """The sum of the frames' durations, found by walking from header to header."""
    seconds = 0.0
    at = 0
    while at + 4 <= len(data):
        # Tags between frames are skipped: ID3v2 has its length in four bytes of seven bits.
        if data[at : at + 3] == b"ID3" and at + 10 <= len(data):
            size = 0
            for byte in data[at + 6 : at + 10]:
                size = size << 7 | byte & 0x7F
            at += 10 + size
            continue

        # A header: 11 bits set, version, layer III, bitrate and rate that are not reserved.
        first, second, third = data[at : at + 3]
        version = second >> 3 & 3
        is_header = first == 0xFF and second >> 5 == 7 and second >> 1 & 3 == 1 and version != 1
        bitrate_index = third >> 4
        rate_index = third >> 2 & 3
        if not is_header or bitrate_index in (0, 15) or rate_index == 3:
            at += 1
            continue

        rate = RATES[version][rate_index]
        bitrate = 1000 * BITRATES[3 if version == 3 else 2][bitrate_index]
        samples = 1152 if version == 3 else 576
        seconds += samples / rate
        at += samples // 8 * bitrate // rate + (third >> 1 & 1)
    return seconds


def n_ogg_streams(data: bytes) -> int:
    """How many logical streams begin in a file."""
    streams = 0
    at = data.find(b"OggS")
    while at >= 0 and at + 6 <= len(data):
        streams += bool(data[at + 5] & STREAM_BEGINS)
        at = data.find(b"OggS", at + 4)
    return streams


def refuse_partial(data: bytes, decoded_seconds: float) -> None:
    """Raise ValueError: the file `data` holds more audio than was decoded of it."""
    if data[:4] == b"OggS":
        if n_ogg_streams(data) > 1:
            raise ValueError(
                "holds several OGG streams, one after the other; save it as one, or WAV"
            )
        return
    if data[:3] == b"ID3" or data[:1] == b"\xff":
        seconds = mp3_seconds(data)
        if seconds > 1.05 * decoded_seconds + 0.5:
            raise ValueError(
                f"only {decoded_seconds:.1f} s of its {seconds:.1f} s of MP3 can be decoded "
                "(joined files, or a variable bitrate without a table); save it again, or as WAV"
            )

"""Audio files, decoded whole or refused.

decode.py      samples and sample rate of a file, in bounded time and memory
whole.py       MP3 and OGG files of which a decoder would return only a part
"""

"""Sound files as samples, or a refusal that names the file.

decode.py        read a file in bounded time and memory; refuse sound that a model cannot use
completeness.py  find the sound that a decoder left out: joined, cut or badly indexed files
"""

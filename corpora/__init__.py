"""Manifests of public corpora, and stage 2's targets from what is known of each clip.

manifests.py   the command that turns a corpus's folder into manifests; writes manifests
readers.py     one function a corpus: its recordings, and what it says of them
layout.py      what all readers use: clips, what is missing, folders and texts on a disk
vocabulary.py  one spelling for each value of an attribute, in all corpora
measure.py     what the signal says: pitch, volume, speaking speed; the seed transcript
workers.py     work on many clips in a pool of processes
texts.py       the command that takes sentences out of plain text files
targets.py     the command that turns seed transcripts into answers to train on
"""

"""Manifests of public corpora, and stage 2's targets made from what the manifests say of each clip.

manifests.py   python -m corpora.manifests: a folder as a corpus unpacks to -> manifests
readers.py     one function a corpus: its recordings and what it says of them
measure.py     what the signal says: pitch, volume, speaking speed; the seed transcript
workers.py     a pool of processes
targets.py     python -m corpora.targets: seed transcripts -> answers to train on
"""

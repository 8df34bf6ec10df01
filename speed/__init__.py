"""What makes the sampler fast and safe, and is not needed to understand it.

canvas.py      the state of sampler.generate: rows, columns, cache, random numbers
checks.py      settings, prompts and weights that the sampler refuses
int8.py        weights in 8 bits, for a card that does not hold them in 16
joined.py      fewer and larger products in a compiled step on a GPU
small.py       fewer operations in a call of a small LM on a CPU
few_rows.py    products of few rows with large weights on a CPU
compiled.py    torch.compile, and CUDA graphs that replay
"""

"""What makes it fast and is not needed to understand it.

few_rows.py    products of few rows with large weights on a CPU
compiled.py    torch.compile, and CUDA graphs that replay
"""

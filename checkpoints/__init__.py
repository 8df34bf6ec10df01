"""Published files <-> our modules: what people need who run full-size weights.

files.py         files on a disk: memory-mapped tensors, JSON, shards, download commands; the one writer `whole_file`
key_tables.py    names in published checkpoints <-> names in our modules
fill.py          fills a module from a file's tensors by a key table
whisper.py       loads and saves the encoder
lm.py            loads and saves the language model, LLaDA's or Qwen3's
adapters.py      loads and saves trained adapters, the release's or ours
model.py         loads a whole DIFFA, saves its trained parts, makes random weights
tokenizer.py     tokenizers behind one interface, and the chat format of each family
few_rows.py      a faster path for few rows of float32 on a CPU
command_line.py  what all commands share: model options, and errors in one line
"""

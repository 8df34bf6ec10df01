"""Published files <-> our modules, for those who run full-size weights.

files.py         files on a disk: mapped tensors, shards, JSON; the writer whole_file
downloads.py     files that are missing: the command that downloads each
key_tables.py    names in published checkpoints <-> names in our modules
fill.py          fills a module from the tensors of a file by a key table
whisper.py       loads and saves the encoder
lm.py            loads and saves the language model, in the format of its family
unsupported.py   language models that would answer wrongly here: refused with the reason
adapters.py      loads and saves trained adapters, the release's or ours
copies.py        copies of the frozen parts in an adapters' file: compared, then dropped
lora.py          LoRA: small trained matrices beside frozen weights (DIFFA-2)
origins.py       what adapters were trained with: recorded and compared
digests.py       short names for weights and files
sizes.py         named shapes of encoders and language models
model.py         loads a whole DIFFA, saves its trained parts, makes random weights
tokenizer.py     tokenizers behind one interface
chats.py         how each family of LMs writes a conversation
command_line.py  what all commands have: options of the model, errors in one line
progress.py      one line a phase: what is done, the time left, the loss
"""

"""The engine of both stages. It makes batches and runs the loop; a stage brings its loss.

command_line.py  the options of both stages' commands
recipe.py        what a recipe holds, and how a run is executed on a machine
stage.py         a stage from manifests to saved adapters
examples.py      items that can be used, with their prompts and answers
batches.py       a step's batch, in the parts that this process computes
order.py         which items a step trains on
states.py        the frozen encoder's states in memory, and clips that cannot be read
stream.py        clips read ahead by worker processes
state_files.py   the encoder's states in a folder
whitening.py     a new acoustic adapter that starts on whitened states
loop.py          the training loop: steps, resume, validation, progress
optimizers.py    settings, learning rate, AdamW and Muon together
muon.py          Muon
run_files.py     checkpoints and metrics
validation.py    the loss on clips that do not train
processes.py     several processes: torchrun, DDP, FSDP
flops.py         the LM's FLOPs and the device's peak
"""

"""The engine of both stages. It makes batches and runs the loop; a stage brings its loss.

recipe.py        what a recipe holds, how a run is executed, and the commands' options
stage.py         a stage from manifests to saved adapters
examples.py      items that can be used, with their prompts and answers
batches.py       a step's batch, in the parts that this process computes
order.py         which items a step trains on
states.py        clips, read ahead or unreadable, and the encoder's states in memory
state_files.py   the encoder's states in a folder
stream.py        the states of step after step, from memory, audio or a folder
whitening.py     a new acoustic adapter that starts on whitened states
loop.py          the training loop: steps, resume, validation, progress
optimizers.py    settings, learning rate, AdamW and Muon together
muon.py          Muon
run_files.py     checkpoints and metrics
validation.py    the loss on clips that do not train
processes.py     several processes: torchrun, DDP, FSDP
flops.py         the LM's FLOPs and the device's peak
"""

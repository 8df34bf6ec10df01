"""The engine of both stages. It makes batches and runs the loop; a stage brings its loss.

recipe.py        what a recipe holds, how a run is executed, and the commands' options
run.py           what a stage is, where a run reads and writes, what is refused
stage.py         a stage from manifests to saved adapters
execution.py     how the frozen LM is run: recomputed, compiled, cut in shards
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
preference.py    the command of stage 4: prefer the better of two answers (DIFFA-2)
align.py         the command of a warm-up: the semantic adapter spells words by CTC
adapt_lm.py      the command that turns a causal LM into a masked-diffusion LM
text_rows.py     the text that such an LM learns from
questions.py     questions about a clip's words and voice, with their answers
imitation.py     text that imitates audio embeddings
exam.py          what such an LM can do with unseen sentences
perplexity.py    how well it predicts each token from all others
flops.py         the LM's FLOPs and the device's peak
"""

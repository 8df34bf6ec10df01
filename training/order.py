"""Which items a step trains on, and which of them this process computes.

The items of a step follow from (seed, step) alone, so a run resumes exactly at any step.
"""

import functools
from collections.abc import Callable

import numpy as np

from training import processes

POOL = 50  # batches that are sorted by length together


def pick(step: int, n_items: int, batch: int, seed: int) -> np.ndarray:
    """Indices (batch,) of a step's items; every epoch is shuffled, and batches may cross epochs."""
    positions = np.arange(step * batch, (step + 1) * batch)  # in the epochs, one after the other
    epochs = positions // n_items

    chosen = np.empty(batch, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = np.random.default_rng([seed, int(epoch)]).permutation(n_items)
        chosen[epochs == epoch] = order[positions[epochs == epoch] % n_items]
    return chosen


def pick_by_length(lengths: np.ndarray, batch: int, seed: int) -> Callable[[int], np.ndarray]:
    """Like `pick`, with clips of similar length in a batch, so that little is padded.

    An epoch is shuffled and cut in pools of POOL batches. Each pool is sorted by length; then the
    batches of the epoch are shuffled. Items that do not fill a batch are left out of that epoch.

    Returns:
        a function from a step to the indices (batch,) of its items. Where the items are too few
        for one batch, this is `pick`.
    """
    per_epoch = len(lengths) // batch
    if per_epoch == 0:
        return lambda step: pick(step, len(lengths), batch, seed)

    @functools.lru_cache(2)
    def batches_of(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: per_epoch * batch]

        pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
        by_length = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(by_length).reshape(per_epoch, batch))

    return lambda step: batches_of(step // per_epoch)[step % per_epoch]


def local_rows(batch: int, accumulate: int) -> np.ndarray:
    """The rows of a batch that this process computes, (accumulate, b), one part after the other.

    Raises ValueError: the batch does not divide into processes * accumulate parts.
    """
    world = processes.world()
    if batch % (world * accumulate):
        parts = f"{world} processes with {accumulate} parts each"
        raise ValueError(f"a batch of {batch} does not divide by {parts}")
    return np.arange(batch).reshape(world, accumulate, -1)[processes.rank()]

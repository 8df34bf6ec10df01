"""Which items a step trains on, and which of them this process computes.

The items of a step follow from (seed, step) alone, so a run resumes exactly at any step.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

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
        return functools.partial(pick, n_items=len(lengths), batch=batch, seed=seed)

    @functools.lru_cache(2)
    def batches_of(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, epoch])
        order = rng.permutation(len(lengths))[: per_epoch * batch]

        pools = [order[i : i + POOL * batch] for i in range(0, len(order), POOL * batch)]
        by_length = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
        return rng.permutation(np.concatenate(by_length).reshape(per_epoch, batch))

    return lambda step: batches_of(step // per_epoch)[step % per_epoch]


def local_rows(batch: int, accumulate: int) -> list[np.ndarray]:
    """The rows of a batch that this process computes, in `accumulate` parts.

    Raises ValueError: the batch does not divide into processes * accumulate parts.
    """
    n_parts = processes.world() * accumulate
    if batch % n_parts:
        raise ValueError(
            f"a batch of {batch} does not divide by {processes.world()} processes with "
            f"{accumulate} parts each"
        )
    parts = np.arange(batch).reshape(n_parts, -1)
    first = processes.rank() * accumulate
    return list(parts[first : first + accumulate])


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which items each step trains on, and in which parts this process computes them."""

    rows_of_step: Callable[[int], np.ndarray]  # from a step to indices (batch,) of items
    parts: list[np.ndarray]  # local rows of a batch, as local_rows gives them
    steps: int

    def parts_of(self, step: int) -> list[np.ndarray]:
        """Indices of the items of each local part of a step."""
        rows = self.rows_of_step(step)
        return [rows[part] for part in self.parts]

    def parts_from(self, step: int) -> Iterator[np.ndarray]:
        """The same for all steps from `step` on, one part after the other."""
        for later in range(step, self.steps):
            yield from self.parts_of(later)

"""Work on many clips in a pool of processes."""

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch
from tqdm import tqdm


def map_in_processes(function: Callable, items: Sequence, label: str) -> list:
    """function(item) of each item, in order, with a progress bar.

    There is a process for each core, with one thread. Raises ChildProcessError: a process died, as
    one that runs C code may. (A multiprocessing.Pool would wait for it for ever.)
    """
    fork = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(None, fork, torch.set_num_threads, (1,))
    try:
        results = pool.map(function, items, chunksize=8)
        return list(tqdm(results, label, len(items), unit=" clips"))
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process for clips died, or memory ran out; free some, then run the same command"
        ) from None
    finally:
        # After an error or Ctrl-C, nothing more is started.
        pool.shutdown(cancel_futures=True)

"""Work on many clips in a pool of processes."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from checkpoints.progress import progress


def begin() -> None:
    """What each process does first."""
    torch.set_num_threads(1)

    # Ctrl-C reaches every process of the terminal; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    # A parent that is killed cannot end its children, so each watches it.
    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def map_in_processes(function: Callable, items: Sequence, label: str) -> list:
    """function(item) of each item, in order, with a line of progress.

    There is a process for each core, with one thread. Raises ChildProcessError: a process died, as
    one that runs C code may. (A multiprocessing.Pool would wait for it for ever.)
    """
    pool = ProcessPoolExecutor(None, multiprocessing.get_context("fork"), begin)
    try:
        results = pool.map(function, items, chunksize=8)
        shown = progress(items, label, unit=" clips", stays=True)
        return [result for _, result in zip(shown, results)]
    except BrokenProcessPool:
        raise ChildProcessError(
            "a process for clips died, or memory ran out; free some, then run the same command"
        ) from None
    except KeyboardInterrupt:
        # A clip of hours would take minutes to finish.
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        # After an error or Ctrl-C, nothing more is started.
        pool.shutdown(cancel_futures=True)

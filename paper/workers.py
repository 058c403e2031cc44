# SPDX-License-Identifier: Apache-2.0
"""Runs several jobs at once, each in a process of its own. Importing this module does not import torch."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed


def num_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_processes() -> int:
    """How many systems to train at once: one for each core, as a small UNet gains little by a second; one on a GPU."""
    import torch

    is_shared = torch.accelerator.is_available() or int(os.environ.get("WORLD_SIZE", 1)) > 1
    return 1 if is_shared else min(4, num_cores())


def run_jobs(jobs: Iterable[Callable[[], None]], processes: int) -> None:
    """Run `jobs`, which must be picklable, in this process or in several others. The first error ends all of them."""
    jobs = list(jobs)
    if processes == 1 or len(jobs) < 2:
        for job in jobs:
            job()
        return
    context, threads = multiprocessing.get_context("spawn"), max(1, num_cores() // processes)
    with ProcessPoolExecutor(processes, context, initializer=_begin_worker, initargs=(threads,)) as pool:
        try:
            for future in as_completed([pool.submit(job) for job in jobs]):
                future.result()
        except BaseException:
            # Ending a worker leaves no broken file: files appear when they are complete.
            for child in multiprocessing.active_children():
                child.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _begin_worker(threads: int) -> None:
    # The process that has started this one handles Ctrl-C.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The variable sets the threads of a torch that is imported later, the call those of one that already is.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)


def _end_with_parent() -> None:
    """A parent that is killed cannot end its workers, and if it starts again, two would train the same system."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

"""Work in several processes that never outlive the one that started them."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, connection, get_context, parent_process


def run_tasks(function, tasks: list[tuple], workers: int, progress=None, sizes: list[int] | None = None) -> list:
    """The results of `function(*task)` for every task, from `workers` processes or, for 0, from this one.

    Whatever ends it early, an error or a signal or what `progress` raises, ends the processes before it is passed on;
    if this process dies without a word, they notice and end themselves.

    Args:
        progress: called with (done, in all) after each task; `sizes` says how much each counts, 1 by default.
    """
    sizes, results, done = sizes or [1] * len(tasks), [None] * len(tasks), 0

    def finish(number, result):
        nonlocal done
        results[number], done = result, done + sizes[number]
        if progress:
            progress(done, sum(sizes))

    if workers == 0:
        for number, task in enumerate(tasks):
            finish(number, function(*task))
        return results
    others = set(active_children())
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _follow_parent) as pool:
        try:
            with _interrupts_held():
                futures = {pool.submit(function, *task): number for number, task in enumerate(tasks)}
            for future in as_completed(futures):
                finish(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            started = set(active_children()) - others
            for child in started:
                child.terminate()
            for child in started:
                child.join()
            raise
    return results


@contextmanager
def _interrupts_held():
    """Holds back Ctrl-C: a process started meanwhile never hears it, this one does so afterwards."""
    earlier = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, earlier)


def _follow_parent():
    def wait():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

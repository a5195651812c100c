"""Work in several processes that never outlive the one that started them."""

import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import active_children, connection, get_context, parent_process


def run_tasks(function, tasks: list[tuple], workers: int):
    """Yields (task number, result) as the tasks are done, in `workers` processes or, for 0, in this one.

    Whatever ends it early, an error, Ctrl-C or a caller who stops asking, ends the processes before it is passed on;
    if this process dies without a word, they notice and end themselves.
    """
    if workers == 0:
        yield from ((i, function(*task)) for i, task in enumerate(tasks))
        return
    others = set(active_children())
    with ProcessPoolExecutor(min(workers, len(tasks)), get_context("spawn"), _follow_parent) as pool:
        futures = {pool.submit(function, *task): i for i, task in enumerate(tasks)}
        started = [child for child in active_children() if child not in others]
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in started:
                child.terminate()
            for child in started:
                child.join()
            raise


def _follow_parent():
    """Leaves Ctrl-C to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def wait():
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()

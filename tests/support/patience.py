"""Tests of what must not hang."""

import signal
from contextlib import contextmanager


@contextmanager
def within(seconds):
    """What takes longer fails instead of hanging."""

    def stop(signum, frame):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)

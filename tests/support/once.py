"""What several processes of one test session need, made by the first of them."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path


def made_once(factory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder below pytest's own, which `make(folder)` made in this process or in another; not to be written to.

    factory: the fixture `tmp_path_factory`.
    """
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = factory.getbasetemp().parent if parallel else factory.getbasetemp()
    folder, done = base / name, base / f"{name}.made"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder

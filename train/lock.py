"""One training at a time in a folder."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = ".lock"


@contextmanager
def claimed(folder: str | Path) -> Iterator[None]:
    """Makes a run's folder and holds it against every other training, until it is left or the process ends.

    What was made is removed again where nothing has been written to it.

    Raises:
        OSError: it cannot be made or written to, or another training holds it; the message is one line.
    """
    folder = Path(folder)
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{folder}: a folder is needed, and there is a file") from None
    except OSError as error:
        raise type(error)(f"{folder} cannot be written to: {error.strerror}") from None
    try:
        _take(lock, folder)
        try:
            yield
        finally:
            if made:
                _remove_empty(folder, made)
    finally:
        os.close(lock)


def _take(lock, folder):
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 200, 0).decode(errors="replace").strip() or "another process"
        raise BlockingIOError(f"{folder} is in use by another training ({holder}); --work-dir takes another") from None
    except OSError as error:  # file systems that have no locks
        print(f"{folder} cannot be locked ({error.strerror}): see that no other training uses it", flush=True)
        return
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _remove_empty(folder, made):
    if os.listdir(folder) == [_NAME]:
        (folder / _NAME).unlink()
        for path in made:
            try:
                path.rmdir()
            except OSError:
                return

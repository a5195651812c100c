"""Files that are there whole or as they were."""

import os
from pathlib import Path

TEMPORARY = ".writing"  # what the name of a file that is being written ends with


def write_whole(path: Path, data: bytes | str) -> None:
    """Replaces a file's content at once, or leaves it as it was and raises OSError."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise

"""Optional dependencies: which extra brings them, said in one line where they are missing."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]


def require(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Args:
        extra: its name in pyproject.toml.
        modules: top-level names, as `import` takes them.

    Raises:
        ImportError: some are missing; the message has the command that installs them.
        SystemExit: the same, while a command of this project starts: it ends with that one line.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if not missing:
        return
    message = f"needs {', '.join(missing)}: pip install '.[{extra}]' in a checkout of rigfuse"
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "/").resolve()
    if script.is_relative_to(_ROOT) and script.relative_to(_ROOT).parts[0] in ("train", "bench"):
        sys.exit(f"{script.name}: {message}")
    raise ImportError(message)


class _Missing:
    """Stands in for a module that is not there: who uses it is told what to install."""

    def __init__(self, extra: str, module: str):
        self._extra, self._module = extra, module

    def __getattr__(self, name):
        require(self._extra, self._module.split(".")[0])


def optional(extra: str, module: str):
    """Returns a module if its package is installed; else what raises `require`'s ImportError where it is used."""
    return import_module(module) if find_spec(module.split(".")[0]) else _Missing(extra, module)

"""Optional dependencies: which extra brings them, said in one line where they are missing."""

from importlib.util import find_spec


def require(extra: str, *modules: str) -> None:
    """Checks that the packages of an extra are installed, without importing them.

    Args:
        extra: its name in pyproject.toml.
        modules: names to import, as `import` takes them.

    Raises:
        ImportError: some are missing; the message has the command that installs them.
    """
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise ImportError(f"needs {', '.join(missing)}: pip install '.[{extra}]' in a checkout of rigfuse")

"""The benchmark of each operation: every file here is one, with cases, inputs and peers, and is found by being here."""

import pkgutil
from importlib import import_module

from ..operation import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (import_module(f".{file.name}", __name__).OPERATION for file in pkgutil.iter_modules(__path__))
}

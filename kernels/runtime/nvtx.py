"""Named ranges for nsys (NVTX domain `rigfuse`), mirrored into torch.profiler, free when nobody listens.

The one place where rigfuse talks to a profiler: operations, module stages, training phases and the benchmark use it.
Without the package nvtx the ranges show in torch.profiler alone.
"""

from contextlib import contextmanager, nullcontext
from functools import lru_cache

import torch

try:
    import nvtx
except ImportError:
    nvtx = None

DOMAIN = "rigfuse"
_NOTHING = nullcontext()


@contextmanager
def _both(name):
    with _nvtx_range(name), torch.profiler.record_function(f"{DOMAIN}::{name}"):
        yield


@lru_cache(256)  # a range can be entered again, also within itself
def _nvtx_range(name):
    return _NOTHING if nvtx is None else nvtx.annotate(name, domain=DOMAIN)


def annotate(name: str):
    """Returns a context manager that shows `name` to whoever profiles. Nothing is recorded inside a compiled graph."""
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:
        return _both(name)
    return _nvtx_range(name)

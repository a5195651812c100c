"""Named ranges for nsys (NVTX domain `rigfuse`), mirrored into torch.profiler, free when nobody listens.

The one place where rigfuse talks to a profiler: operations, module stages, training phases and the benchmark use it.
"""

from contextlib import contextmanager, nullcontext

import nvtx
import torch

DOMAIN = "rigfuse"
_NOTHING = nullcontext()


@contextmanager
def _both(name):
    with nvtx.annotate(name, domain=DOMAIN), torch.profiler.record_function(f"{DOMAIN}::{name}"):
        yield


def annotate(name: str):
    """A context manager that shows `name` to whoever profiles. Nothing is recorded inside a compiled graph."""
    if torch.compiler.is_compiling():
        return _NOTHING
    if torch.autograd.profiler._is_profiler_enabled:
        return _both(name)
    return nvtx.annotate(name, domain=DOMAIN)

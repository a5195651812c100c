"""The three legs of the suite. Each is a process of its own: triton's interpreter and its compiler cannot share one.

pytest                  the PyTorch backend, and the Triton backend in its interpreter
pytest --compile-only   the kernels compiled for GPUs that are not there
pytest --gpu            the tests of the first leg on the GPU, and those that need one
"""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # a process for each core: threads in them would only get in each other's way
    os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["support.fixtures"]


def pytest_addoption(parser):
    parser.addoption("--compile-only", action="store_true", help="compile the kernels for sm_80, sm_90, sm_100, gfx942")
    parser.addoption("--update-budgets", action="store_true", help="with --compile-only: record the registers used")
    parser.addoption("--gpu", action="store_true", help="run on the GPU")


def pytest_configure(config):
    if config.getoption("--gpu") and not config.getoption("collectonly"):
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError(f"--gpu: torch {torch.__version__} finds no CUDA device here")
    if not (config.getoption("--compile-only") or config.getoption("--gpu")):
        os.environ["TRITON_INTERPRET"] = "1"
        # With the interpreter on, every call without a named backend would go through it, those of whole networks too.
        os.environ.setdefault("RIGFUSE_BACKEND", "torch")


def pytest_collection_modifyitems(config, items):
    compile_only, gpu = config.getoption("--compile-only"), config.getoption("--gpu")
    chosen = [
        item
        for item in items
        if bool(item.get_closest_marker("compile_only")) == compile_only and (gpu or not item.get_closest_marker("gpu"))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture(scope="session")
def device(request):
    return "cuda" if request.config.getoption("--gpu") else "cpu"

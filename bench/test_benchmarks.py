"""The quick cases for pytest-benchmark: `pytest bench/ --benchmark-only`.

Results are compared with pytest-benchmark's own means: `--benchmark-autosave`, `--benchmark-compare`,
`--benchmark-compare-fail=median:10%`.
"""

import pytest
import torch

from rigfuse.bench import compare, correctness
from rigfuse.bench.cases import CASES
from rigfuse.bench.workload import MODES
from rigfuse.train.data import open_drives

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


@pytest.fixture(scope="module", params=[name for name, case in CASES.items() if case.quick])
def case(request):
    return CASES[request.param]


@pytest.fixture(scope="module", params=compare.SCOPES)
def workload(request, case):
    return compare.make_workload(request.param, case, tuple(compare.PROVIDERS), DEVICE, open_drives(None))


@pytest.fixture(scope="module", params=compare.PROVIDERS)
def call(request, workload):
    """Right results first, here too."""
    call = workload.build(request.param, DTYPE)
    reference = correctness.compute(workload.build_reference(workload.groups[request.param]), MODES)
    error = correctness.errors(correctness.compute(call, MODES), reference).worst
    assert error <= correctness.CEILING[DTYPE], f"wrong result: relative error {error:.1e}"
    return call


@pytest.mark.parametrize("mode", MODES)
def test_compare(benchmark, call, mode):
    def step():
        call.step(mode)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=call.reset, rounds=5, warmup_rounds=1)

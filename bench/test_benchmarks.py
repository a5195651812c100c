"""The quick cases for pytest-benchmark: `pytest bench/ --benchmark-only`.

Results are compared with pytest-benchmark's own means: `--benchmark-autosave`, `--benchmark-compare`,
`--benchmark-compare-fail=median:10%`.
"""

import pytest
import torch

from rigfuse.bench import correctness
from rigfuse.bench.subjects import compare
from rigfuse.bench.subjects.compare import CASES, default_cases
from rigfuse.bench.workload import MODE_NAMES
from rigfuse.train.data import open_drives

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32


PLACES = [(scope, case) for scope in compare.SCOPES for case in default_cases(scope, True, DEVICE)]


@pytest.fixture(scope="module", params=PLACES, ids="-".join)
def workload(request):
    scope, case = request.param
    return compare.make_workload(scope, CASES[case], tuple(compare.PROVIDERS), DEVICE, open_drives(None))


@pytest.fixture(scope="module", params=compare.PROVIDERS)
def call(request, workload):
    """Right results first, here too."""
    call = workload.build(request.param, DTYPE)
    reference = correctness.compute(workload.build_reference(workload.groups[request.param]), workload.modes)
    error = correctness.errors(correctness.compute(call, workload.modes), reference).worst
    assert error <= correctness.CEILING[DTYPE], f"wrong result: relative error {error:.1e}"
    return call


@pytest.mark.parametrize("mode", MODE_NAMES)
def test_compare(benchmark, workload, call, mode):
    if mode not in workload.modes:
        pytest.skip(f"the scope {workload.scope} has no mode {mode}")

    def step():
        call.step(mode)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(step, setup=call.reset, rounds=5, warmup_rounds=1)

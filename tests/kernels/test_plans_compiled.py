"""What a plan hands to compiled kernels is what triton itself would hand to them."""

from unittest import mock

import pytest
import torch

from rigfuse.bench import compilation
from support.operations import EXAMPLES, KERNELS, run

pytestmark = pytest.mark.compile_only


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """A list of what the launcher of a compiled kernel gets, on what is taken for an sm_90; nothing is started."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    found = []
    with (
        triton.knobs.cache.scope(),
        mock.patch.object(CUDABackend, "make_cubin", lambda *arguments: b""),
        mock.patch.object(compilation, "_start_nothing", lambda *arguments: found.append(arguments)),
        compilation.launches_that_start_nothing("sm_90"),
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))  # it would remember the cubins that are none
        yield found


def told(item, known):
    """`item` with the name of a known tensor, or the dtype of another, in the place of each tensor."""
    if isinstance(item, torch.Tensor):
        return known.get(item.data_ptr(), item.dtype)
    return tuple(told(part, known) for part in item) if isinstance(item, tuple) else item


# Of the kernels' arguments every form: tensors, absent ones, tuples of both and of one another, views.
@pytest.mark.parametrize("name", ["gated_fusion", "window_bias_attention", "bias_softmax", "deformable_aggregation"])
def test_a_plan_launches_what_triton_would(launched, name):
    example, calls = EXAMPLES[name], []
    for seed in range(3):
        arguments = example.make(torch.bfloat16, seed=seed)
        grad = torch.randn_like(run(example, arguments, wanted=())["out"])
        launched.clear()
        run(example, arguments, grad=grad)
        known = {t.data_ptr(): key for key, t in {**arguments, "grad": grad}.items() if isinstance(t, torch.Tensor)}
        # grid, stream and how the kernel is launched; its arguments
        calls.append([(call[:6], told(call[9:], known)) for call in launched])
    assert len(calls[0]) >= len(KERNELS[name])
    assert calls[1] == calls[0] and calls[2] == calls[0]

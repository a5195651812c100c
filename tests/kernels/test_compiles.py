"""Every launch that a call may make compiles, whatever gradients are wanted, whichever arguments are absent.

Calls of the public functions on CPU tensors that are taken for a GPU's; what they would launch is compiled as far as
PTX and not started. A launch whose kernel is compiled already, for arguments that triton does not tell apart, costs
nothing. What the kernels take of registers is the matter of the tests called budgets.
"""

import re
from itertools import chain, combinations
from unittest import mock

import pytest
import torch

from support.operations import EXAMPLES, KERNELS, run

pytestmark = pytest.mark.compile_only


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory):
    """A function that makes a call as on an sm_90 and returns the names of the kernels that it would have launched."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction

    from rigfuse.bench.compilation import pretended_gpu

    names, used, run_kernel = [], set(), JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        if self not in used:  # lest a kernel of another target is found
            used.add(self)
            self.device_caches.clear()
        names.append(self.__name__)
        run_kernel(self, *args, grid=grid, warmup=True, **kwargs)

    def launched(call):
        names.clear()
        call()
        return list(names)

    with (
        triton.knobs.cache.scope(),
        pretended_gpu("sm_90"),
        mock.patch.object(JITFunction, "run", compile_only),
        mock.patch.object(CUDABackend, "make_cubin", lambda *arguments: b""),
    ):
        triton.knobs.cache.dir = str(tmp_path_factory.mktemp("triton"))  # it would remember the cubins that are none
        yield launched
    for function in used:
        function.device_caches.clear()


def subsets(names):
    return chain.from_iterable(combinations(names, count) for count in range(len(names) + 1))


INVALID = "is given without|source_index is None with"  # arguments that need one another


def calls(example, arguments, every):
    """Calls with all arguments there and with all absent that may be; with `every` set of absent ones too, and where
    all are there or absent with each gradient alone and each left out."""
    optional = tuple(name for name, argument in example.table.arguments.items() if argument.optional)
    for absent in subsets(optional) if every else {(), optional}:
        present = {name: value for name, value in arguments.items() if name not in absent}
        gradients = tuple(name for name in example.table.gradients if name in present)
        yield present, gradients
        if every and absent in ((), optional) and len(gradients) > 1:
            others = [tuple(other for other in gradients if other != name) for name in gradients]
            for wanted in {*((name,) for name in gradients), *others}:
                yield present, wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_call_compiles(dry_run, name, dtype):
    example, launched, failed = EXAMPLES[name], set(), {}
    every = dtype == torch.bfloat16 and "hypotheses" not in name  # which differ in what is there in any case
    for arguments, wanted in calls(example, example.make(dtype), every):
        try:
            launched |= set(dry_run(lambda: run(example, arguments, wanted=wanted)))  # noqa: B023
        except Exception as error:
            if not re.search(INVALID, str(error)):
                there = ", ".join(key for key, value in arguments.items() if isinstance(value, torch.Tensor))
                reason = str(error).strip().splitlines()[-1]
                failed[f"gradients of {', '.join(wanted)} with {there}"] = f"{type(error).__name__}: {reason}"
    assert not failed
    assert launched == set(KERNELS[name])


# Sizes and strides of 1 become constants, which a kernel must not take for tensors.
_ONES = dict(sources=1, targets=1, channels=1, source=(1, 1), size=(1, 1), depths=1)
OTHERS = {  # name of the example, its sizes, other arguments
    "head dim 40": ("cross_camera_attention", {"dim": 40}, {}),
    "head dim 17": ("cross_camera_attention", {"dim": 17}, {}),
    "windows, head dim 40": ("window_bias_attention", {"dim": 40}, {}),
    "only windows, head dim 40": ("window_attention", {"dim": 40}, {}),
    "a bias for all keys": ("bias_softmax", {"bias_shape": (2, 1, 5, 1)}, {}),
    "a bias for all": ("bias_softmax", {"bias_shape": ()}, {}),
    "nearest": ("multi_depth_warp", {}, {"mode": "nearest"}),
    "nearest of hypotheses": ("multi_depth_warp of hypotheses", {}, {"mode": "nearest"}),
    "one of everything": ("multi_depth_warp", _ONES, {}),
    "one hypothesis": ("multi_depth_warp of hypotheses", _ONES, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_other_forms_compile(dry_run, case):
    name, sizes, others = OTHERS[case]
    example = EXAMPLES[name]
    arguments = {**example.make(torch.float16, sizes={**example.sizes, **sizes}), **others}
    assert dry_run(lambda: run(example, arguments))

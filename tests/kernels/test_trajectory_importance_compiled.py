"""trajectory_importance compiled for GPUs that are not there."""

import pytest
import torch

from support.compile_only import TARGETS, check_budget, compile_launches

pytestmark = pytest.mark.compile_only


@pytest.mark.parametrize("architecture", TARGETS)
def test_budget(architecture, request):
    from rigfuse.kernels.trajectory_importance.triton import launch_forward

    points, valid = torch.zeros(6, 12, 2), torch.ones(6, 12, dtype=torch.bool)
    (kernel,) = compile_launches(architecture, lambda: launch_forward(points, valid, 28, 50, 2.0))
    check_budget("float32", kernel, request.config.getoption("--update-budgets"))

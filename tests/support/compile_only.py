"""The kernels of real launches, compiled for GPUs that are not there, and held to budgets."""

import json
from pathlib import Path

import torch
import triton

from rigfuse.bench import compilation
from rigfuse.bench.compilation import TARGETS as TARGETS

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORE = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"tcgen05\.mma|UTC\w*MMA|HMMA",
    "gfx942": r"v_mfma_",
}
BUDGETS = Path(__file__).parents[1] / "kernels" / "budgets.json"


class Compiled(compilation.Compiled):
    """A kernel, and how it loads and multiplies."""

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory, straight or on the way to shared memory."""
        if self.architecture.startswith("gfx"):
            return self.count(r"(global|buffer)_load_dwordx4")
        return self.count(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG")

    @property
    def tensor_core_dots(self) -> int:
        return self.count(TENSOR_CORE[self.architecture])


def compile_launches(architecture: str, function, precision: str = "highest") -> list[Compiled]:
    """Every kernel that `function()` would start on `architecture`, compiled, in order; `precision` is that of float32
    products, see `torch.set_float32_matmul_precision`."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        return [Compiled(**vars(kernel)) for kernel in compilation.compile_launches(architecture, function)]
    finally:
        torch.set_float32_matmul_precision(before)


def check_budget(case: str, kernel: Compiled, update: bool) -> None:
    """Shared memory within the chip's; no spill, and registers within what was recorded for this triton version.

    Registers are the compiler's doing: a version for which nobody has recorded an architecture is held to the shared
    memory only.
    """
    key = f"{kernel.name}/{case}/{kernel.architecture}"
    assert kernel.shared <= SHARED_MEMORY[kernel.architecture], f"{key} uses {kernel.shared} bytes of shared memory"
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    of_version = budgets.setdefault(triton.__version__, {})
    recorded = {name: limit for name, limit in of_version.items() if name.endswith(f"/{kernel.architecture}")}
    if update or recorded:
        assert kernel.spilled == 0, f"{key} spills {kernel.spilled}"
    if update:
        of_version[key] = kernel.registers
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    elif recorded:
        assert key in recorded, f"{key} has no register budget; run pytest --compile-only --update-budgets"
        # ptxas may move a register or two between patch versions of its own
        assert kernel.registers <= recorded[key] + 8, f"{key}: {kernel.registers} registers, budget {recorded[key]}"

"""Compiles kernels for GPUs that are not there, from the very launches that users make.

`compile_launches` runs a launch function on CPU tensors under a driver that only names its target; triton then
specialises on the real arguments (alignment, unit strides, absent pointers) as it would on that GPU, and stops before
launching. Nothing about the kernel's signature is written down twice.
"""

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
TENSOR_CORE = {
    "sm_80": r"\bHMMA\.",
    "sm_90": r"\bHGMMA\.",
    "sm_100": r"tcgen05\.mma|UTC\w*MMA|HMMA",
    "gfx942": r"v_mfma_",
}
BUDGETS = Path(__file__).parents[1] / "kernels" / "budgets.json"
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NamedTarget:
    """The part of triton's driver that compilation asks for."""

    def __init__(self, target):
        self._target = target

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@dataclass(frozen=True)
class Compiled:
    name: str
    architecture: str
    registers: int
    spilled: int  # bytes of stack; on AMD also vector registers (scalar ones go to vector lanes, not to memory)
    shared: int  # bytes
    assembly: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.assembly))

    @property
    def wide_loads(self) -> int:
        """Loads of 16 bytes a thread from global memory, straight or on the way to shared memory."""
        if self.architecture.startswith("gfx"):
            return self.count(r"(global|buffer)_load_dwordx4")
        return self.count(r"LDG\.E\S*\.128|LDGSTS\.E\S*\.128|UTMALDG")

    @property
    def loads(self) -> int:
        if self.architecture.startswith("gfx"):
            return self.count(r"(global|buffer)_load_")
        return self.count(r"\bLDG\.|\bLDGSTS\.|UTMALDG")

    @property
    def tensor_core_dots(self) -> int:
        return self.count(TENSOR_CORE[self.architecture])


def compile_launches(architecture: str, launch) -> list[Compiled]:
    """Every kernel that `launch()` would start on `architecture`, compiled."""
    kernels = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # triton keys them by device, and every target here is device 0
        kernels.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        self.device_caches.clear()

    previous = driver._active
    driver.set_active(_NamedTarget(TARGETS[architecture]))
    try:
        with (
            mock.patch.object(JITFunction, "run", compile_instead),
            mock.patch("rigfuse.kernels.runtime.launch.architecture", lambda device: architecture),
        ):
            launch()
    finally:
        driver._active = previous
    return [_inspect(name, architecture, kernel) for name, kernel in kernels]


def _inspect(name, architecture, kernel) -> Compiled:
    if architecture.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        field = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
        return Compiled(name, architecture, field("vgpr_count"), spilled, kernel.metadata.shared, text)
    usage = _run("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(numbers["STACK"]) + int(numbers["LOCAL"])
    assembly = _run("cuobjdump", "--dump-sass", kernel.asm["cubin"])
    return Compiled(name, architecture, int(numbers["REG"]), spilled, kernel.metadata.shared, assembly)


def _run(tool, option, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout


def check_budget(case: str, kernel: Compiled, update: bool) -> None:
    """Shared memory within the chip's; no spill, and registers within what was recorded for this triton version.

    Registers are the compiler's doing: a version that nobody has recorded is held to the shared memory only.
    """
    key = f"{kernel.name}/{case}/{kernel.architecture}"
    assert kernel.shared <= SHARED_MEMORY[kernel.architecture], f"{key} uses {kernel.shared} bytes of shared memory"
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    recorded = budgets.setdefault(triton.__version__, {})
    if update or recorded:
        assert kernel.spilled == 0, f"{key} spills {kernel.spilled}"
    if update:
        recorded[key] = kernel.registers
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
    elif recorded:
        assert key in recorded, f"{key} has no register budget; run pytest --compile-only --update-budgets"
        # ptxas may move a register or two between patch versions of its own
        assert kernel.registers <= recorded[key] + 8, f"{key}: {kernel.registers} registers, budget {recorded[key]}"

"""The kernels of real launches, compiled for a GPU that is not there, and what they consist of.

Within `pretended_gpu` the operations take CPU tensors for those of a GPU of the named architecture and choose the
Triton backend. triton specialises on the real arguments (alignment, unit strides, absent tensors), as it would on that
GPU, and stops before it launches. Results are memory that nobody wrote. Needs triton's compiler, which
TRITON_INTERPRET=1 turns off.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ..kernels.runtime import backends, launch, plans

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+([^;]+);", re.MULTILINE)
_JUMP = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")


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
    """One kernel of one launch. registers: of a thread. spilled, shared: bytes. programs: of the launch's grid."""

    name: str
    architecture: str
    registers: int
    spilled: int  # bytes of stack; on AMD also vector registers (scalar ones go to vector lanes, not to memory)
    shared: int
    programs: int
    assembly: str

    def count(self, pattern: str) -> int:
        return len(re.findall(pattern, self.assembly))

    @property
    def instructions(self) -> list[tuple[int, str]]:
        """(address, text) of every instruction; empty for AMD."""
        return [(int(address, 16), text) for address, text in _INSTRUCTION.findall(self.assembly)]

    @property
    def loops(self) -> list[int]:
        """The instructions of each loop, in the order in which the loops begin; a loop counts those inside it too."""
        instructions = self.instructions
        addresses = [address for address, _ in instructions]
        found = {}
        for address, text in instructions:
            jump = _JUMP.search(text)
            if jump and int(jump.group(1), 16) < address:  # to itself is what fills the end of the code
                first = int(jump.group(1), 16)
                found[first] = max(found.get(first, 0), sum(first <= other <= address for other in addresses))
        return [found[first] for first in sorted(found)]


@contextmanager
def pretended_gpu(architecture: str) -> Iterator[None]:
    """Takes CPU tensors for those of a GPU of `architecture`, one of TARGETS. Nothing may be launched."""
    previous = driver._active
    driver.set_active(_NamedTarget(TARGETS[architecture]))
    plans.forget()
    try:
        with (
            mock.patch.dict("os.environ", {backends.ENVIRONMENT_VARIABLE: "triton"}),
            mock.patch.object(backends, "why_not_triton", lambda tensors: []),
            mock.patch.object(launch, "architecture", lambda device: architecture),
        ):
            yield
    finally:
        driver._active = previous
        plans.forget()


def compile_launches(architecture: str, function: Callable[[], object]) -> list[Compiled]:
    """Every kernel that `function()` would start on `architecture`, compiled, in order."""
    kernels = []
    run = JITFunction.run

    def compile_instead(self, *args, grid, warmup, **kwargs):
        self.device_caches.clear()  # triton keys them by device, and every target here is device 0
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        kernels.append((self.__name__, kernel, grid(kwargs) if callable(grid) else grid))
        self.device_caches.clear()

    with pretended_gpu(architecture), mock.patch.object(JITFunction, "run", compile_instead):
        function()
    return [_inspect(name, architecture, kernel, grid) for name, kernel, grid in kernels]


@contextmanager
def launches_that_start_nothing(architecture: str) -> Iterator[None]:
    """Everything before a launch happens as on a GPU (checks, plans, triton's own work); the launch itself does not."""
    used = set()
    run = JITFunction.run

    def remember(self, *args, **kwargs):
        if self not in used:  # before the first launch, lest a kernel of another target is found
            used.add(self)
            self.device_caches.clear()
        return run(self, *args, **kwargs)

    def load_nothing(self):
        self.module, self.function, self._run = self, 0, _start_nothing

    try:
        with (
            pretended_gpu(architecture),
            mock.patch.object(JITFunction, "run", remember),
            mock.patch.object(CompiledKernel, "_init_handles", load_nothing),
        ):
            yield
    finally:
        for function in used:
            function.device_caches.clear()


def _start_nothing(*arguments):
    pass


def _inspect(name, architecture, kernel, grid) -> Compiled:
    programs = 1
    for count in grid:
        programs *= int(count)
    if architecture.startswith("gfx"):
        text = kernel.asm["amdgcn"]
        field = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        spilled = field("vgpr_spill_count") + field("private_segment_fixed_size")
        return Compiled(name, architecture, field("vgpr_count"), spilled, kernel.metadata.shared, programs, text)
    usage = _run("cuobjdump", "--dump-resource-usage", kernel.asm["cubin"])
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    spilled = int(numbers["STACK"]) + int(numbers["LOCAL"])
    assembly = _run("cuobjdump", "--dump-sass", kernel.asm["cubin"])
    return Compiled(name, architecture, int(numbers["REG"]), spilled, kernel.metadata.shared, programs, assembly)


def _run(tool, option, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([_TOOLS / tool, option, file.name], capture_output=True, text=True, check=True).stdout

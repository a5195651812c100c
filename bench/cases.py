"""The cases of the comparison: how large, how much history, what is missing."""

from dataclasses import dataclass

import torch

CAMERAS = 6


@dataclass(frozen=True)
class Case:
    """One problem size of stage 1, or of a training step of the whole cascade.

    image: (height, width) pixels. stride: pixels per feature cell. moments: T, moments of history. missing: cameras
    that are absent now, of the first sample; sample b misses those b places further in the rig's order.
    quick: belongs to `--quick`. heavy: plain PyTorch needs tens of GB; by default on a GPU only. default: measured
    without being named. experiment: of train/configs, whose networks a training step at this size has ("" = none); in
    that scope stride, channels, heads and so on are the experiment's.
    """

    name: str
    about: str
    image: tuple[int, int] = (900, 1600)
    stride: int = 32
    channels: int = 256
    heads: int = 8
    kv_downsample: int = 4
    depths: tuple[float, ...] = (10.0, 30.0)
    moments: int = 1
    batch: int = 1
    missing: tuple[int, ...] = (0,)
    quick: bool = False
    heavy: bool = False
    default: bool = True
    experiment: str = "completion_v2"

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of a feature map."""
        return self.image[0] // self.stride, self.image[1] // self.stride

    @property
    def cells(self) -> int:
        return self.size[0] * self.size[1]

    def missing_cameras(self, sample: int) -> list[int]:
        return [(camera + sample) % CAMERAS for camera in self.missing]

    @property
    def sizes(self) -> dict[str, int]:
        """The axis along which this case can be plotted; the smallest member of every family is `documents`."""
        documents = dict(cells=1400, moments=1, batch=1, missing=1)
        own = dict(cells=self.cells, moments=self.moments, batch=self.batch, missing=len(self.missing))
        differing = [name for name in own if own[name] != documents[name]]
        return own if not differing else {differing[0]: own[differing[0]]} if len(differing) == 1 else {}


UPSTREAM = (256, 704)
CASES = {
    case.name: case
    for case in (
        Case("documents", "1/32 of 900×1600, as the documents have it", quick=True),
        Case("documents-two-missing", "two cameras missing", missing=(0, 3), quick=True),
        Case("documents-t2", "two moments of history", moments=2),
        Case("documents-t3", "three moments of history", moments=3, default=False),
        Case("documents-t4", "four moments of history", moments=4),
        Case("documents-b2", "batch of 2", batch=2, default=False),
        Case("documents-b4", "batch of 4", batch=4),
        Case("documents-b8", "batch of 8", batch=8),
        Case("upstream", "1/32 of upstream's 256×704", image=UPSTREAM, quick=True, experiment="completion_v2_256x704"),
        Case("upstream-fine", "1/8 of upstream's 256×704", image=UPSTREAM, stride=8, experiment=""),
        Case("upstream-half", "1/32 of 128×352", image=(128, 352), default=False, experiment="completion_v2_256x704"),
        Case("fine", "1/8 of 900×1600: plain PyTorch needs tens of GB", stride=8, heavy=True, experiment=""),
        Case(
            "tiny",
            "to try the command: 4×6 cells",
            (128, 192),
            32,
            32,
            2,
            default=False,
            experiment="completion_v2_tiny",
        ),
    )
}
# Of the scope `step`. At the documents' size plain PyTorch needs tens of GB.
_QUICK_STEPS, _CPU_STEPS, _GPU_STEPS = ("tiny",), ("upstream-half",), ("documents", "documents-t4", "upstream")


def default_cases(scope: str, quick: bool, device: torch.device) -> list[str]:
    """What is measured in a scope where no case is named."""
    on_gpu = device.type == "cuda"
    if scope == "step":
        return list(_QUICK_STEPS if quick else _GPU_STEPS if on_gpu else _CPU_STEPS)
    if quick:
        return [case.name for case in CASES.values() if case.quick]
    return [case.name for case in CASES.values() if case.default and (on_gpu or not case.heavy)]


def suits(scope: str, case: Case, device: torch.device) -> bool:
    """Whether a case that was named is measured in a scope that was not."""
    small = device.type == "cuda" or case.name in (*_QUICK_STEPS, *_CPU_STEPS)
    return scope != "step" or (bool(case.experiment) and small)

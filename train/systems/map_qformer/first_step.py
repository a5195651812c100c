"""Looks at a map network before it trains: sizes, gradients, what must not move, and the memory of a step."""

import math
import resource
import sys
from dataclasses import dataclass

import torch

from ....modules.map_qformer.language import FrozenLanguageModel
from ....modules.map_qformer.losses import MapTruth
from ....modules.map_qformer.network import TRAINED
from ....modules.polylines import line_orders, spread_lines
from ....modules.rig import Rig, RigFrame, nuscenes_like_rig
from ...data.dataset import cover
from ...optim import build_optimizer, set_training
from .data import MapBatch
from .experiment import MapExperiment, MapModel

# Part → what it is in the documents, and how many million parameters it has there.
DOCUMENTS = {
    "qformer": ("Q-Former", 100.0),
    "language": ("language model", 7000.0),
    "queries": ("map queries", 4.3),
    "decoder": ("map decoder", 11.0),
}


@dataclass(frozen=True)
class Part:
    """A part of the network: trained and frozen parameters, and its gradient's norm after a step (None = no step)."""

    name: str
    trained: int
    frozen: int
    gradient: float | None = None


def parts_of(model: MapModel) -> list[Part]:
    """The parts in the order of the data, with their parameters."""
    rows = []
    for name in TRAINED:
        module = getattr(model, name)
        weights = list(module.parameters())
        weights += module.model.parameters() if isinstance(module, FrozenLanguageModel) else []
        trained, frozen = (sum(w.numel() for w in weights if w.requires_grad == kind) for kind in (True, False))
        rows.append(Part(name, trained, frozen))
    return rows


def on_meta(settings: MapExperiment) -> MapModel:
    """The network without any memory; the language model is a Llama of `model.lm`'s sizes."""
    settings.model.lm.source = "random" if settings.model.lm.source != "none" else "none"
    settings.model.qformer.weights = settings.model.images.backbone.weights = None
    with torch.device("meta"):
        return MapModel(settings.model, settings.dropout)


def made_up_batch(settings: MapExperiment, samples: int | None = None) -> MapBatch:
    """Noise for images, a rig like nuScenes', and a line of each class; `samples`: None = a batch of the settings."""
    config, batch = settings.model, samples or settings.loader.batch_size
    height, width = settings.data.image_size
    rig = nuscenes_like_rig()
    cameras = [rig[name] if name in rig.names else rig.cameras[0] for name in config.images.cameras]
    seen = [camera.augmented(cover(camera.width, camera.height, (height, width))) for camera in cameras]
    frame = Rig(seen).frame(torch.eye(4), 0.0, "made up") if len({c.name for c in seen}) == len(seen) else None
    if frame is None:
        raise ValueError("model.images.cameras are not those of nuScenes; --data ROOT gives a batch of the rig's own")
    images = torch.randint(256, (batch, len(seen), 3, height, width), dtype=torch.uint8)
    lines = torch.stack([line_orders(x) for x in spread_lines(len(config.classes), config.points, config.line_range)])
    truth = MapTruth([lines] * batch, [torch.arange(len(config.classes))] * batch)
    return MapBatch(images, RigFrame.cat([frame] * batch), truth, [f"made-up-{index}" for index in range(batch)])


@dataclass(frozen=True)
class StepReport:
    """What one step did."""

    parts: list[Part]
    losses: dict[str, float]
    groups: list[tuple[str, float, int]]  # name, learning rate, parameters
    same_model: bool | None  # whether the frozen model's hash stayed; None = there is none
    gradient_of_frozen: bool
    peak_mib: float

    def problems(self) -> list[str]:
        """What is wrong, a line each; empty = the set-up holds."""
        lines = [f"{p.name}: no gradient" for p in self.parts if p.trained and not p.gradient]
        lines += [f"{p.name}: the gradient is {p.gradient}" for p in self.parts if not math.isfinite(p.gradient or 0)]
        lines += ["the frozen language model moved: its sha256 is another"] if self.same_model is False else []
        return lines + (["the frozen language model has gradients"] if self.gradient_of_frozen else [])


def one_step(settings: MapExperiment, batch: MapBatch, device: torch.device) -> StepReport:
    """Builds the network, runs forward, backward and an update on a batch."""
    model = settings.build_model().to(device)
    optimizer = build_optimizer(model, settings.optim, settings.loader.batch_size)
    set_training(model)
    amp = getattr(torch, settings.run.amp)
    with torch.autocast(device.type, amp, enabled=amp != torch.float32):
        losses = model(batch.to(device)).losses
    sum(settings.losses[name] * loss for name, loss in losses.items()).backward()
    parts = [Part(p.name, p.trained, p.frozen, _norm(getattr(model, p.name))) for p in parts_of(model)]
    optimizer.step()
    frozen, same, gradient = model.language, None, False
    if isinstance(frozen, FrozenLanguageModel):
        same = torch.equal(frozen.digest().cpu(), frozen.fingerprint.cpu())
        gradient = any(p.grad is not None or p.requires_grad for p in frozen.model.parameters())
    groups = [(g["name"], g["lr"], sum(p.numel() for p in g["params"])) for g in optimizer.param_groups]
    values = {name: loss.item() for name, loss in losses.items()}
    return StepReport(parts, values, groups, same, gradient, _peak(device))


def _norm(module):
    """Of the gradients; None where nothing is trained."""
    trained = [p for p in module.parameters() if p.requires_grad]
    grads = [p.grad for p in trained if p.grad is not None]
    return (torch.stack([g.float().norm() for g in grads]).norm().item() if grads else 0.0) if trained else None


def _peak(device):
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 2**20)

"""Static BEV as an experiment: step 1 learns without time, step 2 fuses the past with what step 1 sees."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.distributed as dist

from ....modules.static_bev.head import HeadOutput
from ....modules.static_bev.losses import LOSSES
from ....modules.static_bev.network import Observation, StaticBev, StaticBevConfig
from ... import checkpoint
from ...config import Experiment, to_dict
from ...data.cache import tables_digest
from ...data.images import normalised
from ...distributed import on_first_rank, sum_over_ranks, wait_for_all
from ...optim import matches
from .data import StaticBatch, StaticDataConfig, StaticSamples, StaticWindow, build_static, collate
from .evaluate import EvaluationConfig, Said, measure, sum_of_labels
from .feature_cache import FeatureCache, cache_path, finish, open_arrays, write_row

FROZEN = ("cameras", "view", "lidar", "fuser")  # what `StaticBev.see` consists of
WEIGHTS = dict(lane_focal=1.0, lane_dice=1.0, road_focal=1.0, road_dice=1.0, heat=1.0, box=0.1)


@dataclass
class StaticBevExperiment(Experiment):
    """The network with its data, losses and evaluation."""

    model: StaticBevConfig = field(default_factory=StaticBevConfig)
    data: StaticDataConfig = field(default_factory=StaticDataConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    losses: dict[str, float] = field(default_factory=lambda: {name: WEIGHTS[name] for name in LOSSES})
    metric: str = "iou_best"
    metric_mode: Literal["min", "max"] = "max"
    folder: ClassVar[Path] = Path()  # of the run, set by the trainer

    def build_model(self) -> StaticBev:
        model = self.model.build()
        if self.model.weights:
            take_step1(model, self.model.weights)
        return model

    def build_data(self) -> tuple[StaticSamples, StaticSamples]:
        training, validation = build_static(self.data, self.model, self.run.seed)
        if self.data.cache:
            self._check_cache(len(training))
            self._fill(training, validation)
        self._sets = training, validation
        return training, validation

    def collate(self, items: Sequence[StaticBatch]) -> StaticBatch:
        return collate(items)

    def figure_names(self) -> tuple[str, ...]:
        return ("iou", "iou_best", "series/f1", "series/f1_any", "ap/centre", "ap/iou50")

    def remarks(self, model: StaticBev) -> list[str]:
        """Says where frozen parts are random."""
        frozen = all(not p.requires_grad for name, p in model.named_parameters() if name.split(".")[0] in FROZEN)
        if frozen and not self.model.weights:
            return ["what sees the ground is frozen and random: give step 1's checkpoint as model.weights"]
        return []

    @torch.no_grad()
    def evaluate(self, model: StaticBev, loader) -> dict[str, float]:
        """Figures of lanes, road and instances, and of the mean map of the training labels; see `measure`."""
        names = self._sets[1].names
        model.set_cameras(names)
        look = self._drawing(model) if self.evaluation.pictures and not _rank()[0] else None
        return measure(model, loader, self.evaluation, names, self.mean_map(model), look).figures()

    @torch.no_grad()
    def watch(self, model: StaticBev, batch: StaticWindow, output, step: int, folder: Path) -> None:
        """Draws the first sample of a batch every `evaluation.picture_steps` steps."""
        every = self.evaluation.picture_steps
        if not every or step % every:
            return
        head = HeadOutput(*(part[:1].detach() for part in output.head))
        maps = torch.cat([head.lanes, head.road], dim=1)[0].sigmoid()
        weights = None if output.fused is None or output.fused.weights is None else output.fused.weights[0].detach()
        said = Said(maps, model.head.decode(head)[0], weights, None, None)
        self._draw(model, batch, 0, said, folder / "pictures" / f"training-{step:08d}.png")

    def _drawing(self, model):
        """What draws the first samples of an evaluation."""
        left = [self.evaluation.pictures]

        def look(batch, row, said):
            if left[0] > 0:
                left[0] -= 1
                self._draw(model, batch, row, said, self.folder / "pictures" / f"{batch.tokens[row]}.png")

        return look

    @staticmethod
    def _draw(model, batch, row, said, path):
        from .pictures import draw_said  # matplotlib takes its time

        path.parent.mkdir(parents=True, exist_ok=True)
        draw_said(model, said, batch.truth, row, batch.tokens[row]).savefig(path, dpi=100)

    def mean_map(self, model: StaticBev) -> torch.Tensor:
        """The mean of the training labels, over all ranks: (lanes + road, rows, columns)."""
        if not hasattr(self, "_mean"):
            training = self._sets[0]
            step = -(-len(training) // self.evaluation.constant_samples)
            rank, ranks = _rank()
            sums = sum_of_labels(training, range(0, len(training), step)[rank::ranks])
            sums = sum_over_ranks(sums.to(next(model.parameters()).device))
            self._mean = (sums[:-1] / sums[-1].clamp(min=1)).float()
        return self._mean

    # ---- the cache of what is frozen

    def _check_cache(self, items):
        """ValueError where what is cached would not stay the same."""
        config, data = self.optim, self.data
        ranks = _rank()[1]
        steps = items // (self.loader.batch_size * ranks * self.run.accumulate) * self.run.epochs
        kept = [*config.freeze, *(pattern for pattern, until in config.freeze_until.items() if until >= steps)]
        parts = [name for name in FROZEN if self.model.use_lidar or name not in ("lidar", "fuser")]
        parts = [name for name in parts if self.model.use_cameras or name not in ("cameras", "view")]
        loose = [part for part in parts if not any(matches(pattern, part) for pattern in kept)]
        if loose:
            raise ValueError(f"data.cache needs {', '.join(loose)} frozen for all {steps} steps (optim.freeze_until)")
        if data.resize != (1.0, 1.0) or data.flip or data.rotation:
            raise ValueError("data.cache needs images as they are: data.resize 1, 1, no data.flip, data.rotation 0")

    def _fill(self, training, validation):
        """Opens the caches of both sets; what is not there yet is computed, each rank its share."""
        model, device, amp = None, torch.device("cpu"), getattr(torch, self.run.amp)
        for samples, variants in ((training, 1 + (self.data.p_lost > 0)), (validation, 1)):
            key = self._key(samples, variants)
            index = cache_path(self.data.cache, key)
            there = index.is_file()
            wait_for_all()
            if not there:
                if model is None:
                    if torch.cuda.is_available():
                        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
                    model = self.build_model().to(device).eval()
                    model.set_cameras(samples.names)
                grid = self.model.grid.features()
                shape = (len(samples.places), variants, self.model.channels, *grid.shape)
                on_first_rank(lambda: open_arrays(index, shape, create=True))  # noqa: B023
                with torch.autocast(device.type, amp, enabled=amp != torch.float32):
                    fill_cache(model, samples, open_arrays(index, shape, create=False), device)
                wait_for_all()
                tokens = [samples.moment(place).token for place in range(len(samples.places))]
                on_first_rank(lambda: finish(index, key, tokens, shape))  # noqa: B023
            samples.features = FeatureCache(index, key)

    def _key(self, samples, variants):
        """What the cached features follow from."""
        model, data = to_dict(self.model), self.data
        for part in ("fusion", "history", "head", "weights"):
            del model[part]
        weights = checkpoint.digest(self.model.weights) if self.model.weights else f"seed {self.run.seed}"
        return dict(
            model=model, weights=weights, data=tables_digest(data.root, data.version), image_size=data.image_size,
            sweeps=data.sweeps, split=[drive.name for drive in samples.drives], variants=variants, amp=self.run.amp,
        )  # fmt: skip


def take_step1(model: StaticBev, path: str) -> None:
    """Gives the network the weights of step 1: everything but the fusion has to be there.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint, or not of this network's step 1.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"model.weights is {path}: no such file; train static_bev_step1 first")
    try:
        there = checkpoint.load(path)["model"]
    except checkpoint.CheckpointError as error:
        raise ValueError(f"model.weights: {error}") from None
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("fusion.")}
    lacking = [name for name in own if name not in there]
    other = [name for name in own if name in there and own[name].shape != there[name].shape]
    problems = [f"lacks {len(lacking)} of {len(own)} tensors ({lacking[0]}, …)"] if lacking else []
    if other:
        shapes = f"{tuple(there[other[0]].shape)} where {tuple(own[other[0]].shape)} is needed"
        problems.append(f"has {other[0]} of another shape ({shapes})")
    if problems:
        raise ValueError(f"model.weights: {path} is not of step 1 of this network: it {' and '.join(problems)}")
    model.load_state_dict({name: there[name] for name in own}, strict=False)


@torch.no_grad()
def fill_cache(model: StaticBev, samples: StaticSamples, arrays, device: torch.device) -> None:
    """Computes this rank's share of a cache: every moment whole, and where there is a second variant, with the camera
    missing that training would lose."""
    rank, ranks = _rank()
    for place in range(rank, len(samples.places), ranks):
        images, _, _, visible, points, frame = samples.look(place, {}, False)
        pixels = normalised(images[None].to(device)) if samples.model.use_cameras else None
        scan = [points.to(device)] if samples.model.use_lidar else None
        maps = model.look(pixels)
        for variant in range(arrays[0].shape[1]):
            if variant:
                visible[samples.lost_camera(place)] = False
            features, seen = model.ground(maps, Observation(pixels, frame, visible[None].to(device), scan))
            write_row(arrays, place, variant, features[0], seen[0])


def _rank():
    """(this rank, how many there are)"""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

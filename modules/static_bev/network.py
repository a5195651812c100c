"""The static bird's-eye-view network: cameras and LiDAR to the ground, the past beside it, and what stands there."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..backbones import PyramidConfig, ResNetFPN
from ..lidar.second import LidarConfig
from ..operations import OperationModule
from ..rig import RigFrame
from ..settings import Count
from .fusion import Fused, FusionConfig, TemporalFusion
from .grid import GridConfig
from .head import HeadConfig, HeadOutput, StaticSegHead
from .history import HistoryConfig, HistoryFeatureManager
from .losses import StaticTruth, static_losses
from .view import GroundView, ViewConfig

NUSCENES_GROUPS = {
    "front": ("CAM_FRONT",),
    "front_sides": ("CAM_FRONT_LEFT", "CAM_FRONT_RIGHT"),
    "back_sides": ("CAM_BACK_LEFT", "CAM_BACK_RIGHT"),
    "back": ("CAM_BACK",),
}


def _backbone():
    return PyramidConfig(resnet="resnet34", strides=(8, 16, 32), frozen_stages=-1, norm_eval=False)


def _pillars():
    """Pillars of 0.2 m, whose map has the cells of the documents' grid."""
    size = dict(voxel_size=(0.2, 0.2, 8.0), channels=(32, 64, 128))
    return LidarConfig(**size, frozen_stages=-1, norm_eval=False)


@dataclass
class StaticBevConfig:
    """Settings of a `StaticBev`."""

    grid: GridConfig = field(default_factory=GridConfig)
    use_cameras: bool = True
    groups: dict[str, tuple[str, ...]] = field(default_factory=lambda: dict(NUSCENES_GROUPS))  # name → its cameras
    backbone: PyramidConfig = field(default_factory=_backbone)  # each group has one of its own
    image_channels: Count = 256
    view: ViewConfig = field(default_factory=ViewConfig)
    use_lidar: bool = False
    lidar: LidarConfig = field(default_factory=_pillars)
    channels: Count = 128  # of the ground's map
    history: HistoryConfig = field(default_factory=HistoryConfig)
    fusion: FusionConfig = field(default_factory=FusionConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    weights: str | None = None  # a checkpoint of step 1 to begin with; None = random

    def validate(self) -> None:
        if not (self.use_cameras or self.use_lidar):
            raise ValueError("use_cameras and use_lidar are false, needs one of them")
        cameras = [name for names in self.groups.values() for name in names]
        if self.use_cameras and (not cameras or len(set(cameras)) < len(cameras) or not all(self.groups.values())):
            raise ValueError(f"groups are {self.groups}, need at least one camera each, and none in two")
        if self.use_lidar:
            grid, got = self.grid.features(), self.lidar.bev_shape(self.point_range)
            if got != grid.shape:
                raise ValueError(f"lidar: its map has {got} cells, needs {grid.shape} like the grid")

    @property
    def point_range(self) -> tuple[float, ...]:
        """Where LiDAR points count: lows of x, y, z, then highs."""
        return tuple(limits[end] for end in (0, 1) for limits in (self.grid.x, self.grid.y, self.grid.z))

    @property
    def cameras(self) -> tuple[str, ...]:
        """All cameras, group after group."""
        return tuple(name for names in self.groups.values() for name in names) if self.use_cameras else ()

    def check_rig(self, names: Sequence[str]) -> None:
        """ValueError where the groups are not the cameras of a rig."""
        lacking = [name for name in self.cameras if name not in names]
        surplus = [name for name in names if name not in self.cameras] if self.use_cameras else []
        problems = [f"the rig has no {', '.join(lacking)}"] if lacking else []
        problems += [f"no group has {', '.join(surplus)}"] if surplus else []
        if problems:
            raise ValueError(f"model.groups do not fit the rig {', '.join(names)}: {'; '.join(problems)}")

    def build(self) -> "StaticBev":
        """Builds the network."""
        return StaticBev(self).to(memory_format=torch.channels_last)


@dataclass
class Observation:
    """What the sensors say at one moment of a batch of rigs."""

    images: torch.Tensor | None  # (B, V, 3, H, W), normalised, in the order of the frame's cameras
    frame: RigFrame
    visible: torch.Tensor | None = None  # (B, V) bool, False = this camera is missing; None = all are there
    points: list[torch.Tensor] | None = None  # B of (P, 5), see `VoxelEncoder`


@dataclass
class StaticInput:
    """A batch with its past, oldest moment first; the last one is the present.

    Of each moment there is either an observation or what `StaticBev.see` made of it.
    """

    observations: list[Observation]
    features: list[tuple[torch.Tensor, torch.Tensor]]  # of each moment, instead of observations
    frames: list[RigFrame]
    truth: StaticTruth | None = None
    tokens: list[str] = field(default_factory=list)


@dataclass
class StaticOutput:
    losses: dict[str, torch.Tensor]  # unweighted scalars, see `losses.LOSSES`
    head: HeadOutput
    fused: Fused | None  # None without a fusion block
    figures: dict[str, torch.Tensor] = field(default_factory=dict)  # `history/found`: share of what was asked for


class CameraGroup(nn.Module):
    """Cameras of one kind with a backbone of their own."""

    def __init__(self, backbone: PyramidConfig, channels: int):
        super().__init__()
        self.backbone = ResNetFPN(backbone, channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, V, 3, H, W) → the finest level (B, V, channels, h, w)."""
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        return self.backbone(flat)[0].unflatten(0, images.shape[:2])


class StaticBev(OperationModule):
    """Sees the ground now (`see`), fuses it with what was seen before (`fuse`), and reads it (`head`).

    Args:
        config: see `StaticBevConfig`.
        cameras: the rig's, in the order of the images; None = those of the groups, one after another.
    """

    def __init__(self, config: StaticBevConfig, cameras: Sequence[str] | None = None):
        super().__init__()
        self.config, grid = config, config.grid.features()
        self.set_cameras(config.cameras if cameras is None else cameras)
        channels = config.channels
        if config.use_cameras:
            groups = {name: CameraGroup(config.backbone, config.image_channels) for name in config.groups}
            self.cameras = nn.ModuleDict(groups)
            self.view = GroundView(grid, config.image_channels, channels, config.view)
        if config.use_lidar:
            self.lidar = nn.ModuleDict(config.lidar.build(config.point_range, channels)._asdict())
            inputs = 2 * channels + (channels if config.use_cameras else 0)
            self.fuser = nn.Sequential(
                nn.Conv2d(inputs, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
            )
        if config.fusion.kind != "off":
            self.fusion = TemporalFusion(grid, channels, len(config.history.intervals), config.fusion)
        self.head = StaticSegHead(config.grid.labels(), channels, config.grid.upsample, config.head)

    def set_cameras(self, names: Sequence[str]) -> None:
        """Says in which order images come; ValueError where the groups are not these cameras."""
        self.config.check_rig(names)
        groups = self.config.groups if self.config.use_cameras else {}
        self.places = {group: [tuple(names).index(name) for name in members] for group, members in groups.items()}

    def random_parts(self) -> list[str]:
        """Names the parts that are as random as they were made."""
        return sorted({part for group in self.cameras.values() for part in group.backbone.random_parts()})

    def see(self, observation: Observation) -> tuple[torch.Tensor, torch.Tensor]:
        """The ground of one moment, (B, channels, rows, columns), not negative, and where a sensor sees it,
        (B, 1, rows, columns). Nothing of it depends on the past, so frozen weights give the same in every epoch."""
        return self.ground(self.look(observation.images), observation)

    def look(self, images: torch.Tensor | None) -> torch.Tensor | None:
        """Maps (B, V, image_channels, h, w) of images (B, V, 3, H, W); None where there are no cameras."""
        if not self.config.use_cameras:
            return None
        by_camera = [None] * images.shape[1]
        for name, places in self.places.items():
            for place, maps in zip(places, self.cameras[name](images[:, places]).unbind(1)):
                by_camera[place] = maps
        return torch.stack(by_camera, dim=1)

    def ground(self, maps: torch.Tensor | None, observation: Observation) -> tuple[torch.Tensor, torch.Tensor]:
        """`see`, given what `look` made of the images. Maps of cameras that are not visible are not read."""
        found, seen = [], None
        if self.config.use_cameras:
            images = observation.images
            projection = observation.frame.image_T_ego.float().to(images.device)
            size = tuple(images.shape[-2:])
            if any(pixels % cells for pixels, cells in zip(size, maps.shape[-2:])):
                stride = self.config.backbone.strides[0]
                raise ValueError(f"StaticBev: images are {size[0]} × {size[1]}, need multiples of {stride} pixels")
            ground, seen = self.view([maps], projection, size, observation.visible)
            found.append(ground)
        if self.config.use_lidar:
            ground = self._scan(observation.points)
            found.append(ground)
            seen = torch.ones_like(ground[:, :1])
            return self.fuser(torch.cat(found, dim=1)), seen
        return found[0], seen

    def fuse(
        self, features: tuple[torch.Tensor, torch.Tensor], frame: RigFrame, history: HistoryFeatureManager | None
    ) -> tuple[HeadOutput, Fused | None, float | None]:
        """Reads the ground of the present with its past, which must not hold the present yet.

        Args:
            features: what `see` returned.
            frame: the present.
            history: None = there is no past.

        Returns:
            The head's output, what was fused, and the share of the intervals for which there was a frame.
        """
        present, seen = features
        if self.config.fusion.kind == "off":
            return self.head(present), None, None
        if not self.config.fusion.reads_history:
            fused = self.fusion(present, seen, None)
            return self.head(fused.features), fused, None
        past = (history or self.new_history()).pick(frame, present)
        fused = self.fusion(present, seen, past)
        return self.head(fused.features), fused, past.found.float().mean().item()

    def stream(self, observation: Observation, history: HistoryFeatureManager) -> HeadOutput:
        """One moment of a drive after the other: sees, fuses, remembers. Begin with `new_history()`."""
        features = self.see(observation)
        output = self.fuse(features, observation.frame, history)[0]
        history.push(features[0], observation.frame)
        return output

    def new_history(self) -> HistoryFeatureManager:
        """A history of nothing."""
        return HistoryFeatureManager(self.config.history)

    def forward(self, batch: StaticInput) -> StaticOutput:
        """The losses of a batch, in its present; what the past needs is computed without gradient."""
        history, last = self.new_history(), len(batch.frames) - 1
        for step, frame in enumerate(batch.frames):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
                features = batch.features[step] if batch.features else self.see(batch.observations[step])
            if step < last:
                history.push(features[0], frame)
        output, fused, found = self.fuse(features, batch.frames[-1], history)
        losses = {}
        if batch.truth is not None:
            losses = static_losses(output, batch.truth, self.head.grid, self.head.turns)
        figures = {} if found is None else {"history/found": torch.tensor(found)}
        return StaticOutput(losses, output, fused, figures)

    def _scan(self, points):
        parts, sizes = self.lidar, [len(each) for each in points]
        sample = torch.arange(len(points), device=points[0].device).repeat_interleave(
            torch.tensor(sizes, device=points[0].device), output_size=sum(sizes)
        )
        voxels = parts["voxel_encoder"](torch.cat(list(points)), sample, len(points))
        return parts["neck"](parts["backbone"](parts["middle_encoder"](voxels)))

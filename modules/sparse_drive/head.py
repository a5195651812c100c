"""The driving head: from the feature maps of a moment to objects, tracks, map lines, motion and a plan."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.runtime.nvtx import annotate
from ..attention import check_heads
from ..detection.boxes import DETECTION_CLASSES
from ..rig import NUSCENES_CAMERAS, RigFrame
from ..settings import Count, Positive
from .anchors import Anchors, spread_anchors
from .bank import BankState, Link
from .decoder import BoxConfig, InstanceOutput, LineConfig
from .deformable import Views
from .motion import EgoConfig, MotionConfig, MotionOutput, MotionPlanner, MotionState

LINE_CLASSES = ("ped_crossing", "divider", "boundary")


@dataclass(frozen=True, eq=False)
class DriveState:
    """What the head hands on from moment to moment, per sample. All of it is plain tensors: it may be stored."""

    frame: RigFrame  # the moment that it comes from
    detection: BankState
    lines: BankState
    motion: MotionState | None  # None without motion and planning


@dataclass(frozen=True, eq=False)
class DriveOutput:
    detection: InstanceOutput  # anchors of 11 numbers, see `boxes`
    lines: InstanceOutput  # anchors of 2 · points numbers, metres
    motion: MotionOutput | None


@dataclass
class HeadConfig:
    """SparseDrive small. Defaults are this toolkit's; `as_upstream` gives what the released weights were made with."""

    channels: Count = 256
    heads: Count = 8  # of every attention
    cameras: tuple[str, ...] = NUSCENES_CAMERAS
    levels: Count = 4
    classes: tuple[str, ...] = DETECTION_CLASSES
    line_classes: tuple[str, ...] = LINE_CLASSES
    line_range: tuple[Positive, Positive] = (60.0, 30.0)  # metres along x and y that have map lines
    max_gap: Positive = 2.0  # seconds after which a moment is no past
    standard_interval: Positive = 0.5  # seconds between moments, assumed where there is no past
    with_motion: bool = True  # motion and planning; False = stage 1
    ego: EgoConfig = field(default_factory=EgoConfig)
    detection: BoxConfig = field(default_factory=BoxConfig)
    lines: LineConfig = field(default_factory=LineConfig)
    motion: MotionConfig = field(default_factory=MotionConfig)

    def validate(self) -> None:
        """Holds settings of different parts to one another; ValueError names the setting."""
        check_heads("heads", self.heads, self.channels)
        if self.channels % 8:
            raise ValueError(f"channels is {self.channels}, needs a multiple of 8")
        for name in ("detection", "lines"):
            part, groups = getattr(self, name), getattr(self, name).deformable.groups
            if self.channels % groups:
                raise ValueError(f"{name}.deformable.groups is {groups}, needs a divisor of {self.channels} channels")
            if not part.kept < part.anchors:
                raise ValueError(f"{name}.kept is {part.kept}, needs less than {part.anchors} anchors")
            if not part.single_frame_layers <= part.layers:
                raise ValueError(f"{name}.single_frame_layers is {part.single_frame_layers}, needs 1 to {part.layers}")
        if self.motion.ego_view not in ("all", *self.cameras):
            raise ValueError(f"motion.ego_view is {self.motion.ego_view!r}, needs 'all' or a camera")

    def build(self) -> "SparseDriveHead":
        return SparseDriveHead(self)


def as_upstream(config: HeadConfig, front: str = "CAM_FRONT") -> HeadConfig:
    """Sets, in place, every option to what SparseDrive's own code does, and the frame to its LiDAR frame: x right, y
    ahead, z up, origin at the LiDAR. Returns the config.

    Projections and poses must then be those of that frame, and the cameras in upstream's order.
    """
    for decoder in (config.detection, config.lines):
        decoder.stale_history, decoder.track_ids = "attended", "batch"
        decoder.deformable.renormalise = decoder.deformable.half_pixel = False
    config.motion.ego_view, config.motion.ego_speed = front, "predicted"
    half_turn = 1.5707963267948966
    config.line_range = (30.0, 60.0)
    config.ego = EgoConfig(box=(0.0, 0.5, -1.06, 4.08, 1.73, 1.56, half_turn), ground=-1.84023)
    return config


class SparseDriveHead(nn.Module):
    """Detection, tracking, map, motion and planning from a moment's feature maps (SparseDrive: Sun et al. 2024).

    It streams: call it for one moment after another with the state that it returned. A sample whose scene changed,
    whose last moment is more than `max_gap` seconds ago, or whose time did not advance begins anew, and no other does.
    """

    def __init__(self, config: HeadConfig):
        super().__init__()
        self.config = config
        sizes = (config.channels, config.heads, config.levels)
        self.detection = config.detection.build(*sizes, len(config.classes))
        self.lines = config.lines.build(*sizes, len(config.line_classes), config.ego.ground)
        self.motion = None
        if config.with_motion:
            self.motion = MotionPlanner(
                config.motion, config.channels, config.heads, len(config.classes), config.ego, config.cameras
            )
        self.set_anchors(spread_anchors(config))

    @torch.no_grad()
    def set_anchors(self, anchors: Anchors) -> None:
        """Replaces what the instances begin as, before training; shapes must be those of the configuration."""
        places = [(self.detection.bank.anchor, anchors.boxes), (self.lines.bank.anchor, anchors.lines)]
        if self.motion is not None:
            places += [(self.motion.motion_anchor, anchors.motion), (self.motion.plan_anchor, anchors.plan)]
        for place, values in places:
            if place.shape != values.shape:
                got = f"anchors of shape {tuple(values.shape)}"
                raise ValueError(f"SparseDriveHead: {got}, needs {tuple(place.shape)}")
            place.copy_(values)

    def forward(
        self,
        maps: list[torch.Tensor],
        frame: RigFrame,
        image_size: tuple[int, int],
        state: DriveState | None = None,
        *,
        visible: torch.Tensor | None = None,
        ego_status: torch.Tensor | None = None,
    ) -> tuple[DriveOutput, DriveState]:
        """One moment of B samples.

        Args:
            maps: for each scale, the finest first, (B, V, C, h, w); get gradients. The images' sides must be multiples
                of the maps'.
            frame: the rig now, V cameras; no gradient. "Ego" is the frame that `HeadConfig.ego` speaks of.
            image_size: height and width of the images that `frame` projects to, pixels.
            state: what the moment before returned; None = a drive begins.
            visible: (B, V) bool, False = a camera that is absent: its maps are not read. None = all are there.
            ego_status: (B, 10) measured, see `MotionConfig.ego_speed`.

        Returns:
            What there is, and the state for the next moment, which has no gradient.

        Raises:
            ValueError: a shape does not fit, or the state is of another batch.
        """
        device = maps[0].device
        if maps[0].shape[1] != len(self.config.cameras):
            needed = f"{len(self.config.cameras)}: {', '.join(self.config.cameras)}"
            raise ValueError(f"SparseDriveHead: maps are of {maps[0].shape[1]} cameras, needs {needed}")
        dtype = torch.float64 if maps[0].dtype == torch.float64 else torch.float32
        views = Views(list(maps), frame.image_T_ego.to(device, dtype), tuple(image_size), visible)
        standard = self.config.standard_interval
        link, interval = None, torch.full((frame.batch_size,), standard, dtype=dtype, device=device)
        if state is not None:
            link = Link.between(state.frame, frame, max_gap=self.config.max_gap, standard=standard, device=device)
            interval = link.interval.to(dtype)
        with annotate("sparse_drive.detection"):
            detection, bank = self.detection(views, link, state and state.detection, interval)
        with annotate("sparse_drive.lines"):
            lines, line_bank = self.lines(views, link, state and state.lines, interval)
        motion, motion_state = None, None
        if self.motion is not None:
            with annotate("sparse_drive.motion"):
                past = state and state.motion
                motion, motion_state = self.motion(
                    views, detection, lines, self.detection.encoder, link, past, ego_status
                )
        state = DriveState(frame.clone(), bank, line_bank, motion_state)
        return DriveOutput(detection, lines, motion), state

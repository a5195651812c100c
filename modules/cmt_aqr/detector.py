"""The detector: images and points → maps → routed queries → boxes. CMT (Yan et al. 2023) with AQR.

System C of the design documents. Parts are named as there, so that their patterns for learning rates match.
"""

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import nn

from ...kernels.runtime.nvtx import annotate
from ..attention import check_heads
from ..backbones import FPN, BackboneConfig, ResNet
from ..detection.batch import DetectionInput
from ..detection.boxes import Detections, Predictions, decode
from ..detection.denoising import Denoising, make_denoising
from ..detection.dense import DenseHead
from ..detection.losses import detection_losses
from ..grid_mask import grid_mask
from ..lidar.second import SECOND, LidarConfig, SECONDNeck, SparseMiddleEncoder
from ..lidar.voxels import VoxelEncoder
from ..maps_layout import MapLayout
from ..operations import OperationModule
from ..rig import NUSCENES_CAMERAS
from ..settings import Count, NonNegative, Range, Share, Whole
from .aqr import (
    GENERATIONS,
    AQRConfig,
    AQRWeightGenerator,
    AttentionBiasGenerator,
    PointWeightGenerator,
    gather_local,
    modulate,
    render_weights,
)
from .encodings import CoordinateEncoding, Encoding
from .head import BoxCode, TaskHeads
from .transformer import DecoderConfig, QueryDecoder, Routing

_STRIDE = 16  # image pixels per cell of the camera maps


@dataclass
class DetectorConfig:
    """Settings of the detector. Defaults are this toolkit's; `as_upstream` gives what CMT's weights were made with."""

    channels: Count = 256  # of all maps and queries
    queries: Count = 900
    cameras: Count = len(NUSCENES_CAMERAS)
    encoding: Encoding = "metric"  # of places, see `CoordinateEncoding`
    depths: Count = 64  # points on the ray of a camera's cell
    box_code: BoxCode = "metric"  # see `TaskHeads`
    prior: Annotated[float, Range(above=0, below=1)] = 0.01  # score of every class before training
    denoising_groups: Whole = 10  # copies of each box among the denoising queries; 0 = no denoising
    nearness: NonNegative = 0.0  # how sharply queries begin to look at their own place, see `QueryDecoder`; 0 = not
    dense: bool = False  # in training every cell of the BEV map is asked what stands there, see `DenseHead`
    grid_mask: Share = 0.0  # share of the training steps in which squares of the images are blanked, see `grid_mask`
    camera: BackboneConfig = field(default_factory=BackboneConfig)
    lidar: LidarConfig = field(default_factory=LidarConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    aqr: AQRConfig = field(default_factory=AQRConfig)

    def validate(self) -> None:
        """ValueError where heads do not divide the channels, or an encoding does not fit."""
        check_heads("decoder.heads", self.decoder.heads, self.channels)
        check_heads("aqr.heads", self.aqr.heads, self.aqr.channels)
        if self.lidar.grid is not None and self.encoding != "cmt":
            raise ValueError(f"lidar.grid is {self.lidar.grid}, needs encoding cmt: others place cells by the range")

    def build(
        self, image_size: tuple[int, int], point_range: tuple[float, ...], backend: str | None = None
    ) -> "CmtAqr":
        """Builds the detector for images (height, width) of nuScenes' cameras and points in a range (metres, ego
        frame); `backend` is that of the operations, see `rigfuse.kernels`."""
        channels, layout = self.channels, self.layout(image_size, point_range)
        lidar = self.lidar.build(point_range, channels)
        shared_conv = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        backbone = ResNet(self.camera, (_STRIDE, 2 * _STRIDE))
        heads = self.decoder.heads if self.nearness else 0
        parts = dict(
            img_backbone=backbone,
            img_neck=FPN(backbone.channels, channels, levels=1),
            pts_voxel_encoder=lidar.voxel_encoder,
            pts_middle_encoder=lidar.middle_encoder,
            pts_backbone=lidar.backbone,
            pts_neck=lidar.neck,
            shared_conv=nn.Sequential(shared_conv, nn.BatchNorm2d(channels), nn.ReLU()),
            query_embed=CoordinateEncoding(channels, layout, depths=self.depths, encoding=self.encoding, heads=heads),
            transformer=QueryDecoder(channels, self.decoder, nearness=self.nearness),
            task_heads=TaskHeads(channels, self.decoder.layers, box_code=self.box_code, prior=self.prior),
        )
        weights, bias = self.aqr.build(channels, layout)
        detector = CmtAqr(
            **parts,
            queries=self.queries,
            generation=self.aqr.generation,
            aqr_weight_generator=weights,
            attention_bias_generator=bias,
            denoising_groups=self.denoising_groups,
            grid_mask=self.grid_mask,
            dense_head=DenseHead(channels, layout) if self.dense else None,
        )
        detector.backend = backend
        return detector.to(memory_format=torch.channels_last)  # that of the maps, and so of the weights' gradients

    def layout(self, image_size: tuple[int, int], point_range: tuple[float, ...]) -> MapLayout:
        """Lays out the maps for images and points as `build` takes them."""
        height, width = (-(-side // _STRIDE) for side in image_size)
        lidar = self.lidar
        extent = lidar.bev_extent(point_range) if lidar.grid else None
        return MapLayout(
            lidar.bev_shape(point_range), (height, width), self.cameras, _STRIDE, tuple(point_range), extent
        )


UPSTREAM_RANGE = (-54.0, -54.0, -5.0, 54.0, 54.0, 3.0)  # metres, LiDAR frame


def as_upstream(config: DetectorConfig) -> DetectorConfig:
    """Sets, in place, every option to what CMT's own code does (voxel0100_r50_800x320), and returns the config.

    The frame must then be the LiDAR's, x right and y ahead, and the range `UPSTREAM_RANGE`. Upstream's grid is smaller
    than that range: the BEV map ends 5.6 m before it on the far sides, and cells are encoded as if it did not. Two
    things have no option: the attention's own dropout in training, and the limit on the number of voxels.
    """
    config.encoding = config.box_code = "cmt"
    config.prior, config.decoder.feedforward_dropout = 0.1, 0.0
    config.nearness, config.dense = 0.0, False
    lidar = config.lidar
    lidar.vfe, lidar.grid, lidar.last_z_padding = "mean", (41, 1024, 1024), 0
    return config


@dataclass
class DetectorOutput:
    """What the detector says of the matching queries; denoising queries leave nothing but their losses."""

    predictions: Predictions
    losses: dict[str, torch.Tensor]  # unweighted scalars: cls, box, dn_cls, dn_box, dense_…; empty outside training
    weights: torch.Tensor | None  # (B, N, 2), what AQR gives camera and LiDAR; None without AQR
    reference: torch.Tensor  # (B, N, 3) metres, ego frame
    figures: dict[str, torch.Tensor]  # scalars to watch, without gradient


@dataclass(frozen=True, eq=False)
class _Queries:
    """Where the queries are: P denoising queries, in training only, then N matching ones."""

    reference: torch.Tensor  # (B, P + N, 3) in [0, 1] of the range
    points: torch.Tensor  # (B, P + N, 3) metres, ego frame
    cells: torch.Tensor  # (B, P + N, 1 + V, 2), see `MapLayout.cells`
    denoising: Denoising | None

    @property
    def first(self) -> int:
        """The place of the first matching query, P."""
        return 0 if self.denoising is None else self.denoising.reference.shape[1]

    @property
    def self_mask(self) -> torch.Tensor | None:
        """Who may attend to whom, (P + N, P + N) bool; None = everybody to everybody."""
        return self.denoising.mask if self.first else None


class CmtAqr(OperationModule):
    """Detects objects with cameras and LiDAR.

    Queries begin at learned places and gather what they need from the bird's-eye-view map and all camera maps at once.
    With AQR each query weighs the two modalities first: see `aqr` for the generations. Boxes, labels and points have no
    gradients; a part that is frozen keeps no activations for backward, for nothing before it takes gradients.
    `DetectorConfig.build` puts the parts together; `backend` is that of all their operations.

    Args:
        img_backbone: gives the maps that `img_neck` takes.
        img_neck: its first level makes the camera maps.
        pts_voxel_encoder, pts_middle_encoder, pts_backbone, pts_neck: from points to a map, one after another.
        shared_conv: from that map to the BEV map of C channels.
        query_embed: encodes the places of queries and tokens; its layout is that of the maps.
        transformer: the decoder.
        task_heads: from its states to boxes.
        queries: N, number of queries that are matched.
        generation: of AQR, one of `GENERATIONS`.
        aqr_weight_generator, attention_bias_generator: None with generation "none".
        denoising_groups: see `make_denoising`; 0 = no denoising.
        grid_mask: chance, in training, that `grid_mask` blanks a part of the images.
        dense_head: supervises the BEV map in training; None = only queries do.
    """

    def __init__(
        self,
        *,
        img_backbone: ResNet,
        img_neck: FPN,
        pts_voxel_encoder: VoxelEncoder,
        pts_middle_encoder: SparseMiddleEncoder,
        pts_backbone: SECOND,
        pts_neck: SECONDNeck,
        shared_conv: nn.Module,
        query_embed: CoordinateEncoding,
        transformer: QueryDecoder,
        task_heads: TaskHeads,
        queries: int,
        generation: str,
        aqr_weight_generator: AQRWeightGenerator | PointWeightGenerator | None = None,
        attention_bias_generator: AttentionBiasGenerator | None = None,
        denoising_groups: int,
        grid_mask: float = 0.0,
        dense_head: DenseHead | None = None,
    ):
        super().__init__()
        if generation not in GENERATIONS:
            raise ValueError(f"CmtAqr: generation is {generation!r}, needs one of {', '.join(GENERATIONS)}")
        generators = aqr_weight_generator, attention_bias_generator
        if [part is None for part in generators] != [generation == "none"] * 2:
            needed = "neither aqr_weight_generator nor attention_bias_generator" if generation == "none" else "both"
            raise ValueError(f"CmtAqr: generation is {generation!r}, needs {needed}")
        if queries < 1:
            raise ValueError(f"CmtAqr: queries is {queries}, needs at least 1")
        self.generation, self.denoising_groups, self.grid_mask = generation, denoising_groups, grid_mask
        self.img_backbone, self.img_neck = img_backbone, img_neck
        self.pts_voxel_encoder, self.pts_middle_encoder = pts_voxel_encoder, pts_middle_encoder
        self.pts_backbone, self.pts_neck, self.shared_conv = pts_backbone, pts_neck, shared_conv
        self.query_embed, self.layout = query_embed, query_embed.layout
        self.reference_points = nn.Parameter(torch.rand(queries, 3))
        self.aqr_weight_generator, self.attention_bias_generator = generators
        self.transformer, self.task_heads, self.dense_head = transformer, task_heads, dense_head

    def forward(self, batch: DetectionInput) -> DetectorOutput:
        """Detects objects; boxes and labels are read in training only, for the losses.

        Raises:
            ValueError: a shape does not fit the rig or the maps that the network was made for.
        """
        with annotate("camera_branch"):
            images = self.camera_maps(batch.images)
        with annotate("lidar_branch"):
            bev = self.bev_map(batch.points)
        if len(bev) != len(images):
            raise ValueError(f"CmtAqr: batch has points of {len(bev)} samples and images of {len(images)}")
        return self.decide(bev, images, batch)

    def decide(self, bev: torch.Tensor, images: torch.Tensor, batch: DetectionInput) -> DetectorOutput:
        """Detects objects in maps, as from `bev_map` and `camera_maps`; of `batch` it reads the projections, and in
        training boxes and labels."""
        queries = self._queries(batch)
        with annotate("encodings"):
            query_pos = self.query_embed.queries(queries.points, batch.image_T_ego, queries.cells)
            memory_pos = self.query_embed.memory(batch.image_T_ego)
        with annotate("aqr"):
            key, value, routing, weights = self._route(queries, query_pos, bev, images, memory_pos)
        with annotate("query_decoder"):
            states = self.transformer(query_pos, key, value, routing, queries.self_mask)
        with annotate("task_heads"):
            predictions = self.task_heads(states, queries.reference, self.layout.point_range)
        losses = {}
        if self.training:
            with annotate("detection_losses"):
                losses = detection_losses(predictions, batch.boxes, batch.labels, queries.denoising)
                if self.dense_head is not None:
                    scanned = torch.tensor([len(part) > 0 for part in batch.points], device=bev.device)
                    losses |= self.dense_head.losses(bev, batch.boxes, batch.labels, scanned)
        first = queries.first
        matching = Predictions(predictions.logits[:, :, first:], predictions.boxes[:, :, first:])
        return DetectorOutput(matching, losses, weights, queries.points[:, first:], self._figures(weights))

    def detect(self, batch: DetectionInput) -> list[Detections]:
        """Returns what is in each sample, see `decode`; for a network in evaluation."""
        return decode(self(batch).predictions)

    def camera_maps(self, images: torch.Tensor) -> torch.Tensor:
        """Turns images (B, V, 3, H, W), normalised, into maps (B, V, C, h, w) in channels_last memory format."""
        flat = images.flatten(0, 1)
        if self.training and self.grid_mask:
            flat = grid_mask(flat, self.grid_mask)
        maps = self.img_backbone(flat.contiguous(memory_format=torch.channels_last))
        maps = self.img_neck(maps)[0].unflatten(0, images.shape[:2])
        if maps.shape[-2:] != self.layout.view_shape:
            got = f"images has shape {tuple(images.shape)}, which makes maps of {tuple(maps.shape[-2:])}"
            raise ValueError(f"CmtAqr: {got}, needs {self.layout.view_shape}")
        return maps

    def bev_map(self, points: list[torch.Tensor]) -> torch.Tensor:
        """Turns the points of each sample (P, F), see `DetectionInput`, into maps (B, C, H, W). A sample without points
        has a map of zeros, which batch norms do not see: with it in a small batch they would fit neither kind."""
        scanned = [index for index, part in enumerate(points) if len(part)]
        branch = self.pts_voxel_encoder, self.pts_middle_encoder, self.pts_backbone, self.pts_neck, self.shared_conv
        if not scanned:
            idle = sum(parameter.sum() for part in branch for parameter in part.parameters())  # has a gradient, of 0
            return (0 * idle).expand(len(points), self.shared_conv[0].out_channels, *self.layout.bev_shape)
        sample = [torch.full((len(points[i]),), place, device=points[i].device) for place, i in enumerate(scanned)]
        voxels = self.pts_voxel_encoder(torch.cat([points[i] for i in scanned]), torch.cat(sample), len(scanned))
        maps = self.shared_conv(self.pts_neck(self.pts_backbone(self.pts_middle_encoder(voxels))))
        if len(scanned) == len(points):
            return maps
        places = torch.tensor(scanned, device=maps.device)
        return maps.new_zeros(len(points), *maps.shape[1:]).index_copy(0, places, maps)

    def _queries(self, batch: DetectionInput) -> _Queries:
        """The matching queries, in training behind denoising ones that are drawn anew for every batch."""
        reference, denoising = self.reference_points.expand(len(batch.images), -1, -1), None
        if self.training:
            count, point_range = len(self.reference_points), self.layout.point_range
            denoising = make_denoising(batch.boxes, batch.labels, count, point_range, groups=self.denoising_groups)
            reference = torch.cat([denoising.reference, reference], dim=1)
        points = self.layout.metres(reference)
        return _Queries(reference, points, self.layout.cells(points, batch.image_T_ego), denoising)

    def _route(
        self,
        queries: _Queries,
        query_pos: torch.Tensor,
        bev: torch.Tensor,
        images: torch.Tensor,
        memory_pos: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, Routing | None, torch.Tensor | None]:
        """The decoder's keys and values (B, L, C), its routing, and the weights of the matching queries (B, N, 2)."""
        value = torch.cat([bev.flatten(2).mT, images.flatten(3).mT.flatten(1, 2)], dim=1)
        key = value + memory_pos
        if self.generation == "none":
            return key, value, None, None
        if isinstance(self.aqr_weight_generator, PointWeightGenerator):
            local, seen = gather_local(bev, images, queries.cells, backend=self.backend)
            weights = self.aqr_weight_generator(query_pos, local, seen).float()
        else:
            weights = self.aqr_weight_generator(query_pos, key, value, queries.cells).float()
        matching, bias = weights[:, queries.first :], self.attention_bias_generator
        if self.generation == "v3":
            return key, value, bias(weights, queries.cells), matching
        rendered = render_weights(1 + bias.per_map(matching), queries.cells[:, queries.first :], bias.maps)
        value = modulate(value, rendered, self.generation)
        return value + memory_pos, value, None, matching

    def _figures(self, weights):
        """The scale as it is learned and the mean |weight| of each modality: they show whether AQR is used at all."""
        if weights is None:
            return {}
        camera, lidar = weights.detach().abs().mean(dim=(0, 1))
        figures = {"aqr/weight_camera": camera, "aqr/weight_lidar": lidar}
        if self.generation == "v3":
            figures["aqr/bias_scale"] = self.attention_bias_generator.bias_scale.detach().clone()
        return figures

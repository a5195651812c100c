"""The camera + LiDAR detector with AQR as an experiment (system C)."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from ....modules.backbones import FPN, RESNET50, RESNET_TINY, ResNet
from ....modules.cmt_aqr.aqr import AQRWeightGenerator, AttentionBiasGenerator
from ....modules.cmt_aqr.detector import CmtAqr
from ....modules.cmt_aqr.encodings import CoordinateEncoding
from ....modules.cmt_aqr.head import TaskHeads, decode
from ....modules.cmt_aqr.transformer import QueryDecoder
from ....modules.lidar.second import SECOND, SECONDNeck, SparseMiddleEncoder, VoxelEncoder, grid_shape
from ....modules.rig import NUSCENES_CAMERAS
from ...config import Experiment
from ...data.splits import split_names
from ...distributed import sum_over_ranks
from ...metrics.detection import evaluate_detection
from .data import DetectionBatch, DetectionConfig, build_detection, collate

_RESNETS = {"resnet50": RESNET50, "tiny": RESNET_TINY}
_STRIDE = 16  # image pixels per cell of the camera maps


@dataclass
class CameraConfig:
    resnet: Literal["resnet50", "tiny"] = "resnet50"
    weights: str | None = None  # a local folder or a hub name; None = random
    frozen_stages: int = 4
    norm_eval: bool = True


@dataclass
class LidarConfig:
    voxel_size: tuple[float, float, float] = (0.1, 0.1, 0.2)  # x, y, z, metres
    channels: tuple[int, ...] = (16, 32, 64, 128)  # of the middle encoder's stages, each half the size of the last
    blocks: int = 2  # in each of them
    second: tuple[int, int] = (128, 256)  # channels of SECOND's stages
    layers: int = 5  # convolutions in each of them after the first
    frozen_stages: int = 3
    norm_eval: bool = True  # of SECOND and of its neck


@dataclass
class DecoderConfig:
    layers: int = 6
    heads: int = 8
    feedforward: int = 1024
    dropout: float = 0.1
    checkpoint: bool = False  # compute the layers again in backward instead of keeping what they need


@dataclass
class AQRConfig:
    generation: Literal["none", "v1", "v2", "v3"] = "v3"
    window_sizes: tuple[int, int] = (8, 5)  # cells: camera, LiDAR
    bias_scale: float = 2.5
    min_scale: float = 0.5
    max_scale: float = 5.0
    learnable_scale: bool = True
    use_local_bias: bool = True


@dataclass
class DetectorConfig:
    channels: int = 256
    queries: int = 900
    denoising_groups: int = 10
    camera: CameraConfig = field(default_factory=CameraConfig)
    lidar: LidarConfig = field(default_factory=LidarConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    aqr: AQRConfig = field(default_factory=AQRConfig)

    def build(self, image_size: tuple[int, int], point_range: tuple[float, ...]) -> CmtAqr:
        """For images (height, width) and for points in the range of `DetectionConfig`."""
        lidar, shapes = self._lidar(point_range), self._shapes(image_size, point_range)
        settings = dict(vars(self.camera))
        backbone = ResNet(_RESNETS[settings.pop("resnet")], strides=(_STRIDE, 2 * _STRIDE), **settings)
        detector = CmtAqr(
            img_backbone=backbone,
            img_neck=FPN(backbone.channels, self.channels, levels=1),
            **lidar,
            query_embed=CoordinateEncoding(self.channels, **shapes),
            transformer=QueryDecoder(self.channels, **vars(self.decoder)),
            task_heads=TaskHeads(self.channels, layers=self.decoder.layers),
            **self._aqr(shapes),
            queries=self.queries,
            denoising_groups=self.denoising_groups,
        )
        return detector.to(memory_format=torch.channels_last)  # that of the maps, and so of the weights' gradients

    def _shapes(self, image_size, point_range) -> dict:
        """Of the maps."""
        views = (-(-side // _STRIDE) for side in image_size)
        halved = 2 ** (len(self.lidar.channels) - 1)  # between the middle encoder's stages
        cells = (-(-voxels // halved) for voxels in grid_shape(point_range, self.lidar.voxel_size)[1:])
        return dict(
            bev_feature_shape=tuple(cells),
            pers_feature_shape=(len(NUSCENES_CAMERAS), *views),
            point_range=point_range,
            stride=_STRIDE,
        )

    def _lidar(self, point_range) -> dict[str, nn.Module]:
        config, channels = self.lidar, self.channels
        voxels = VoxelEncoder(point_range=point_range, voxel_size=config.voxel_size)
        middle = SparseMiddleEncoder(spatial_shape=voxels.spatial_shape, channels=config.channels, blocks=config.blocks)
        layers, norm = (config.layers,) * 2, dict(norm_eval=config.norm_eval)
        second = SECOND(middle.out_channels, config.second, layers, frozen_stages=config.frozen_stages, **norm)
        neck = SECONDNeck(config.second, (channels, channels), **norm)
        shared = nn.Conv2d(2 * channels, channels, 3, padding=1, bias=False)
        return dict(
            pts_voxel_encoder=voxels,
            pts_middle_encoder=middle,
            pts_backbone=second,
            pts_neck=neck,
            shared_conv=nn.Sequential(shared, nn.BatchNorm2d(channels), nn.ReLU()),
        )

    def _aqr(self, shapes) -> dict:
        settings = dict(vars(self.aqr))
        generation = settings.pop("generation")
        if generation == "none":
            return dict(generation=generation)
        return dict(
            generation=generation,
            aqr_weight_generator=AQRWeightGenerator(self.channels, hidden=self.channels),
            attention_bias_generator=AttentionBiasGenerator(**shapes, **settings),
        )


@dataclass
class DetectionExperiment(Experiment):
    model: DetectorConfig = field(default_factory=DetectorConfig)
    data: DetectionConfig = field(default_factory=DetectionConfig)
    losses: dict[str, float] = field(default_factory=lambda: dict(cls=2.0, box=0.25, dn_cls=2.0, dn_box=0.25))
    metric: str = "NDS"
    metric_mode: Literal["min", "max"] = "max"

    def build_model(self) -> CmtAqr:
        return self.model.build(self.data.image_size, self.data.point_range)

    def build_data(self):
        return build_detection(self.data, self.run.seed)

    def collate(self, items: Sequence[DetectionBatch]) -> DetectionBatch:
        return collate(items)

    def evaluate(self, model: CmtAqr, loader) -> dict[str, float]:
        """The official figures, see `evaluate_detection`; with AQR its scale and its mean |weight| by modality too."""
        found, sums = {}, torch.zeros(3, dtype=torch.float64)  # Σ |camera|, Σ |LiDAR|, samples
        for batch in loader:
            output = model(batch)
            found |= zip(batch.tokens, decode(output.predictions))
            if output.weights is not None:
                sums += torch.tensor([*output.weights.abs().mean(dim=1).sum(dim=0).tolist(), len(batch.tokens)])
        split = split_names(self.data)[1]
        figures = evaluate_detection(found, self.data.root, self.data.version, split)
        if self.model.aqr.generation == "none":
            return figures
        camera, lidar, samples = sum_over_ranks(sums).tolist()
        figures |= {"aqr/weight_camera": camera / samples, "aqr/weight_lidar": lidar / samples}
        if self.model.aqr.generation == "v3":
            figures["aqr/bias_scale"] = model.attention_bias_generator.bias_scale.item()
        return figures

"""The whole network: images → image tokens → Q-Former → frozen language model with map queries → decoder → lines."""

from dataclasses import dataclass, field

import torch
from torch import nn

from ...kernels.runtime.nvtx import annotate
from ..rig import RigFrame
from ..settings import Count, Positive
from .decoder import DecoderConfig, MapDecoder, MapOutput
from .images import ImageConfig, ImageTokens
from .language import LanguageConfig
from .qformer import QFormerConfig, SceneQFormer
from .queries import MapQueries, sequence_mask

CLASSES = ("divider", "ped_crossing", "boundary")
TRAINED = ("images", "qformer", "queries", "language", "decoder")  # parts; of the language model only what `none` has


@dataclass
class MapQFormerConfig:
    """Settings of a `MapQFormer`; the defaults are the design documents'."""

    images: ImageConfig = field(default_factory=ImageConfig)
    qformer: QFormerConfig = field(default_factory=QFormerConfig)
    lm: LanguageConfig = field(default_factory=LanguageConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    classes: tuple[str, ...] = CLASSES
    instances: Count = 50
    points: Count = 20  # of a line; a closed one ends where it begins
    shared_queries: bool = False  # 50 + 20 vectors instead of 1,050
    line_range: tuple[Positive, Positive] = (60.0, 30.0)  # metres ahead and behind, metres to both sides

    def validate(self) -> None:
        if self.points < 2:
            raise ValueError(f"points is {self.points}, needs at least 2")

    def build(self) -> "MapQFormer":
        """See `LanguageConfig.build` and `SceneQFormer` for what may go wrong."""
        return MapQFormer(self)


class MapQFormer(nn.Module):
    """Finds the lines of the map around the ego car, from the images of one moment.

    Args:
        config: see `MapQFormerConfig`.
    """

    def __init__(self, config: MapQFormerConfig):
        super().__init__()
        self.config = config
        self.images = ImageTokens(config.images, config.qformer.width, config.qformer.grid)
        self.language = config.lm.build()
        width, scale = self.language.width, self.language.scale
        self.qformer = SceneQFormer(config.qformer, len(config.images.cameras), width, scale)
        self.queries = MapQueries(config.instances, config.points, width, scale, config.shared_queries)
        sizes = config.instances, config.points, len(config.classes)
        self.decoder = MapDecoder(config.decoder, width, *sizes, config.line_range)

    def forward(self, images: torch.Tensor, frame: RigFrame, missing: torch.Tensor | None = None) -> MapOutput:
        """Says what lines there are.

        Args:
            images: (B, V, 3, H, W), normalised, in the order of `config.images.cameras`.
            frame: the rigs of the batch; their augmented projections.
            missing: (B, V) bool, True = this camera must not be looked at; None = all are there.

        Raises:
            ValueError: shapes that do not fit, or a sample without any camera.
        """
        batch, cameras = frame.batch_size, len(self.config.images.cameras)
        if images.ndim != 5 or images.shape[:3] != (batch, cameras, 3):
            needed = f"({batch}, {cameras}, 3, H, W) like frame and the model's cameras"
            raise ValueError(f"MapQFormer: images has shape {tuple(images.shape)}, needs {needed}")
        if missing is not None and (missing.shape != images.shape[:2] or missing.dtype != torch.bool):
            told = f"missing is {tuple(missing.shape)} {str(missing.dtype).removeprefix('torch.')}"
            raise ValueError(f"MapQFormer: {told}, needs {tuple(images.shape[:2])} bool")
        with annotate("map_qformer.images"):
            tokens, parts, there = self.images(images, frame, missing)
        with annotate("map_qformer.qformer"):
            scene = self.qformer(tokens, parts, there)
        with annotate("map_qformer.language"):
            mask = sequence_mask(scene.shape[1], self.config.instances, self.config.points, scene.device)
            found = self.language(scene, self.queries(), mask)
        with annotate("map_qformer.decoder"):
            return self.decoder(found)

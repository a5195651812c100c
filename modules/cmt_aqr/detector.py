"""The detector: images and points → maps → routed queries → boxes. CMT (Yan et al. 2023) with AQR.

System C of the design documents. Parts are named as there, so that their patterns for learning rates match.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ...kernels.runtime.nvtx import annotate
from ..backbones import FPN, ResNet
from ..detection.batch import DetectionInput
from ..detection.denoising import Denoising, make_denoising
from ..detection.losses import detection_losses
from ..lidar.second import SECOND, SECONDNeck, SparseMiddleEncoder, VoxelEncoder
from .aqr import GENERATIONS, AQRWeightGenerator, AttentionBiasGenerator, gather_local, modulate, render_weights
from .encodings import CoordinateEncoding
from .head import Detections, Predictions, TaskHeads, decode, range_bounds
from .transformer import QueryDecoder, Routing


@dataclass
class DetectorOutput:
    """Of the matching queries; denoising queries leave nothing but their losses."""

    predictions: Predictions
    losses: dict[str, torch.Tensor]  # unweighted scalars: cls, box, dn_cls, dn_box; empty outside training
    weights: torch.Tensor | None  # (B, N, 2), what AQR gives camera and LiDAR; None without AQR
    reference: torch.Tensor  # (B, N, 3) metres, ego frame
    figures: dict[str, torch.Tensor]  # scalars to watch, without gradient


class CmtAqr(nn.Module):
    """Detects objects with cameras and LiDAR.

    Queries begin at learned places and gather what they need from the bird's-eye-view map and all camera maps at once.
    With AQR each query weighs the two modalities first: see `aqr` for the generations. Boxes, labels and points have no
    gradients; a part that is frozen keeps no activations for backward, for nothing before it takes gradients.

    Args:
        img_backbone: gives the maps that `img_neck` takes.
        img_neck: its first level makes the camera maps.
        pts_voxel_encoder, pts_middle_encoder, pts_backbone, pts_neck: from points to a map, one after another.
        shared_conv: from that map to the BEV map of C channels.
        query_embed: encodes the places of queries and tokens; its shapes are those of the maps.
        transformer: the decoder.
        task_heads: from its states to boxes.
        queries: N, number of queries that are matched.
        generation: of AQR, one of `GENERATIONS`.
        aqr_weight_generator, attention_bias_generator: None with generation "none".
        denoising_groups: see `make_denoising`; 0 = no denoising.
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
        queries: int = 900,
        generation: str = "v3",
        aqr_weight_generator: AQRWeightGenerator | None = None,
        attention_bias_generator: AttentionBiasGenerator | None = None,
        denoising_groups: int = 10,
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
        self.generation, self.denoising_groups = generation, denoising_groups
        self.img_backbone, self.img_neck = img_backbone, img_neck
        self.pts_voxel_encoder, self.pts_middle_encoder = pts_voxel_encoder, pts_middle_encoder
        self.pts_backbone, self.pts_neck, self.shared_conv = pts_backbone, pts_neck, shared_conv
        self.query_embed = query_embed
        self.reference_points = nn.Parameter(torch.rand(queries, 3))
        self.aqr_weight_generator, self.attention_bias_generator = generators
        self.transformer, self.task_heads = transformer, task_heads

    def forward(self, batch: DetectionInput) -> DetectorOutput:
        """Boxes and labels are read in training only.

        Raises:
            ValueError: a shape does not fit the rig or the maps that the network was made for.
        """
        with annotate("camera_branch"):
            images = self.camera_maps(batch.images)
        with annotate("lidar_branch"):
            bev = self.bev_map(batch.points)
        if len(bev) != len(images):
            raise ValueError(f"CmtAqr: batch has points of {len(bev)} samples and images of {len(images)}")
        reference, denoising, padding = self._references(batch)
        low, high = range_bounds("CmtAqr: point_range", self.query_embed.point_range, reference.device)
        metres = low + (high - low) * reference
        with annotate("encodings"):
            query_pos = self.query_embed.queries(metres, batch.image_T_ego)
            memory_pos = self.query_embed.memory(batch.image_T_ego)
        with annotate("aqr"):
            memory, routing, weights = self._route(query_pos, bev, images, metres, batch.image_T_ego, padding)
        with annotate("query_decoder"):
            mask = denoising.mask if padding else None
            states = self.transformer(query_pos, memory, memory_pos, routing, mask)
        with annotate("task_heads"):
            predictions = self.task_heads(states, reference, self.query_embed.point_range)
        losses = {}
        if self.training:
            with annotate("detection_losses"):
                losses = detection_losses(predictions, batch.boxes, batch.labels, denoising)
        matching = Predictions(predictions.logits[:, :, padding:], predictions.boxes[:, :, padding:])
        return DetectorOutput(matching, losses, weights, metres[:, padding:], self._figures(weights))

    def detect(self, batch: DetectionInput) -> list[Detections]:
        """What is in each sample, see `decode`; for a network in evaluation."""
        return decode(self(batch).predictions)

    def camera_maps(self, images: torch.Tensor) -> torch.Tensor:
        """(B, V, 3, H, W), normalised → (B, V, C, h, w), maps in channels_last memory format."""
        maps = self.img_backbone(images.flatten(0, 1).contiguous(memory_format=torch.channels_last))
        maps = self.img_neck(maps)[0].unflatten(0, images.shape[:2])
        if maps.shape[-2:] != self.query_embed.camera_shape:
            got = f"images has shape {tuple(images.shape)}, which makes maps of {tuple(maps.shape[-2:])}"
            raise ValueError(f"CmtAqr: {got}, needs {self.query_embed.camera_shape}")
        return maps

    def bev_map(self, points: list[torch.Tensor]) -> torch.Tensor:
        """For each sample (P, F), see `DetectionInput` → (B, C, H, W); a sample may have no point."""
        sample = torch.cat([torch.full((len(own),), index, device=own.device) for index, own in enumerate(points)])
        voxels = self.pts_voxel_encoder(torch.cat(points), sample, len(points))
        return self.shared_conv(self.pts_neck(self.pts_backbone(self.pts_middle_encoder(voxels))))

    def _references(self, batch) -> tuple[torch.Tensor, Denoising | None, int]:
        """Reference points (B, P + N, 3) in [0, 1] of the range; in training with those of P denoising queries."""
        own = self.reference_points.expand(len(batch.images), -1, -1)
        if not self.training:
            return own, None, 0
        settings = (len(self.reference_points), self.query_embed.point_range)
        denoising = make_denoising(batch.boxes, batch.labels, *settings, groups=self.denoising_groups)
        return torch.cat([denoising.reference, own], dim=1), denoising, denoising.reference.shape[1]

    def _route(
        self, query_pos, bev, images, reference, image_T_ego, padding
    ) -> tuple[torch.Tensor, Routing | None, torch.Tensor | None]:
        """The decoder's memory (B, L, C), its routing, and the weights of the matching queries (B, N, 2)."""
        memory = torch.cat([bev.flatten(2).mT, images.flatten(3).mT.flatten(1, 2)], dim=1)
        if self.generation == "none":
            return memory, None, None
        bias = self.attention_bias_generator
        centers = bias.centers(reference, image_T_ego)
        weights = self.aqr_weight_generator(query_pos, *gather_local(bev, images, centers)).float()
        matching = weights[:, padding:]
        if self.generation == "v3":
            return memory, bias(weights, centers), matching
        rendered = render_weights(1 + bias.per_map(matching), centers[:, padding:], bias.maps)
        return modulate(memory, rendered, self.generation), None, matching

    def _figures(self, weights):
        """The scale as it is learned, and the mean of |weight|, to see whether AQR is used at all."""
        if weights is None:
            return {}
        camera, lidar = weights.detach().abs().mean(dim=(0, 1))
        figures = {"aqr/weight_camera": camera, "aqr/weight_lidar": lidar}
        if self.generation == "v3":
            figures["aqr/bias_scale"] = self.attention_bias_generator.bias_scale.detach().clone()
        return figures

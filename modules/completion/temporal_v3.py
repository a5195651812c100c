"""Stage 1, version 3: geometry first. Every source goes straight into the missing camera's view, at every scale."""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from ...kernels import gated_fusion, multi_depth_warp
from ...kernels.runtime.nvtx import annotate
from ..attention import CameraAttention
from ..history import PyramidHistory, pooled
from ..maps import replace_maps
from ..rig import NUSCENES_CAMERAS, RigFrame
from ..topology import Topology
from .sources import FAR_GROUND, Hypotheses, Sources, hypothesize, list_sources
from .stage import TemporalConfig, TemporalStage, make_decoder
from .usual import UsualMaps

KINDS = 3  # of sources, see `Sources.kind`
STEEPNESS = 0.1  # of the score that a plane loses by its distance from the ground


class MotionCompensatedTemporalCompletionV3(TemporalStage):
    """Completes the features of missing cameras, at every scale, by what is known of the geometry (V3).

    Its sources are the newest moments of every listed camera and the present of those that are not missing. Each is
    brought straight into the missing camera's view at several depths and on the ground, in one call of
    `multi_depth_warp`. How much each counts is said by the *target* cell: by where its ray meets the ground, by which
    camera and where it is, by the source's age and kind, and by whether the source sees the place at all. One more
    hypothesis is that there is nothing unusual. What a camera usually shows in a cell, its running mean, stays where it
    is, and what moves is the difference from it: so a constant is expressible, doubt leads to it, and features that say
    where in the image they are do not go astray. Attention over the sources, a decoder and a gate refine the scale
    `config.stride`; the others take its weights and, through one linear layer, what it refined.

    Missing cameras are completed whether there is a history or not. The rest is as in V1.

    Args:
        channels: C of the feature maps.
        strides: of the scales, `config.stride` among them.
        config: see `TemporalConfig`; None = its defaults. The depths are those of the planes besides the ground.
        cameras: names of the V cameras in the order of the feature maps.
        topology: which cameras a missing one may look at, for other rigs than those that `config.topology` can name.
        backend: of the operations, see `rigfuse.kernels`; may be set later too.
    """

    every_scale = True

    def __init__(
        self,
        channels: int,
        strides: tuple[int, ...],
        config: TemporalConfig | None = None,
        *,
        cameras: tuple[str, ...] = NUSCENES_CAMERAS,
        topology: Topology | None = None,
        backend: str | None = None,
    ):
        config = config or TemporalConfig()
        super().__init__(channels, config, cameras=cameras, topology=topology, strides=strides)
        if self.stride not in self.strides:
            raise ValueError(f"stride is {self.stride}, needs one of the scales' {self.strides}")
        self.kv_downsample, self.moments = config.kv_downsample, config.moments
        self.coarse = self.strides.index(self.stride)
        self.register_buffer("depths", torch.tensor(config.depths, dtype=torch.float32), persistent=False)

        self.attention = CameraAttention(channels, len(self.cameras), heads=config.heads)
        self.hypotheses = len(config.depths) + 2  # of a source
        self.steer = nn.Sequential(  # of a cell: a score of each hypothesis, of each kind of source, of the usual
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, self.hypotheses + KINDS + 1)
        )
        self.age_score = nn.Parameter(torch.tensor(-1.0))  # for each second
        self.steepness = STEEPNESS
        scales = range(len(self.strides))
        self.usual = UsualMaps(len(self.strides), len(self.cameras), channels, config.grid)
        self.decoder = make_decoder(channels)
        others = [index for index in scales if index != self.coarse]
        self.lift = nn.ModuleDict({str(index): nn.Conv2d(2 * channels, channels, 1) for index in others})
        self.gate = nn.ModuleList(
            nn.Sequential(nn.Conv2d(2 * channels, channels // 4, 1), nn.GELU(), nn.Conv2d(channels // 4, 1, 1))
            for _ in scales
        )
        # Training starts from the geometry alone, with the own past before the others', and an open gate.
        for layer in (self.steer[-1], self.attention.out, self.decoder[-1], *self.lift.values()):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.steer[-1].bias[-KINDS - 1 :] = torch.tensor([0.0, -2.0, -1.0, -1.0])
        for gate in self.gate:
            nn.init.constant_(gate[-1].bias, 4.0)
        self.backend = backend

    def complete(
        self,
        features: list[torch.Tensor],
        missing: torch.Tensor,
        frame: RigFrame,
        history: PyramidHistory,
        *,
        every: bool = False,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Completes the missing cameras from a history, which forgets what cannot be the past of `frame`.

        With `every` all maps are worked on and those of the missing cameras kept, so that no shape hangs on a value;
        the history must be that of `frame` already.

        Args:
            features: for each of `strides` (B, V, C, H, W); get gradients, through the present cameras too.
            missing: (B, V) bool.
            frame: the rig at this moment.
            history: earlier moments at every scale.

        Returns:
            the features, and which cameras were completed, (B, V) bool: all that are missing.
        """
        if not self.enable:
            return features, torch.zeros_like(missing)
        for x in features:
            self._validate(x, missing, frame)
        with annotate("temporal_completion"):
            if self.training:
                self.usual.learn(features, missing)
            if not every:
                history.prepare(frame, features)
            sources = list_sources(missing.cpu(), frame, history.frames, self._table, self.moments, every=every)
            if len(sources.sample):
                features = self._complete(features, sources, history, missing if every else None)
        return features, missing

    def _complete(self, features, sources, history, only):
        device, completed, refined = features[0].device, list(features), None
        index = sources.sample.to(device), sources.camera.to(device)
        score = self._scores(index[1], self._key_size(features[self.coarse].shape[-2:]))

        def complete(original, scale):
            nonlocal refined
            facts = index[1], score, sources, history
            completion, refined = self._complete_scale(scale, features[scale], original, *facts, refined)
            return self._fuse(original, completion, scale)

        for scale in sorted(range(len(self.strides)), key=lambda scale: scale != self.coarse):
            completed[scale] = replace_maps(features[scale], index, partial(complete, scale=scale), only=only)
        return completed

    def _complete_scale(self, scale, features, original, camera, score, sources, history, refined):
        """The missing maps (N, C, H, W) of a scale before the gate, and what was refined at the coarse one."""
        coarse, past = scale == self.coarse, history.queues[scale].frames
        with annotate("temporal_completion.warp"):
            maps = self._unusual(scale, features, past, sources)
            look = _Look(maps, self.strides[scale] * history.pool, sources)
            base = self._base(features, scale, camera, score, look)
            base = base + self.usual.at(scale, camera, base)
            keys = self._keys(base.shape[-2:], score, look) if coarse else None
            del maps, look  # the most that is held at once, without gradients
        if coarse:
            completion = self._refine(original, base, camera, keys)
            return completion, completion - base if len(self.strides) > 1 else None
        detail = F.interpolate(refined, size=base.shape[-2:], mode="bilinear", align_corners=False)
        return base + self.lift[str(scale)](torch.cat([base, detail], dim=1)), refined

    def _scores(self, camera, size):
        """What the target cells say of the hypotheses, (N, J + KINDS + 1, H, W), by camera and place: so smooth that
        the resolution of keys is enough."""
        now = torch.zeros(len(camera), device=camera.device)
        return self.steer(self.attention.encoding(camera, now, size)).mT.unflatten(-1, size).float()

    def _unusual(self, scale, features, past, sources):
        """What is unusual in the sources of a scale, (S, C, h, w); the past has no gradient."""
        if not len(sources.maps):
            return features.new_zeros(1, features.shape[2], 1, 1)  # nobody sees anything
        batch, views = features.shape[:2]
        found = []
        for step, place in sources.by_moment(batch * views):
            chosen = place.to(features.device)
            if step == 0:
                x = pooled(features.flatten(0, 1)[chosen], self._history_pool)
                found.append(x - self.usual.at(scale, chosen % views, x))
            else:
                x = past[step - 1].maps(chosen).to(features.dtype)  # a copy, without gradient
                if sources.every:
                    x.sub_(self.usual.at(scale, chosen % views, x))
                else:  # one by one: no second copy is held
                    for one, view in zip(x, (place % views).tolist()):
                        one.sub_(self.usual.at(scale, slice(view, view + 1), x)[0])
                found.append(x)
        return torch.cat(found)

    def _base(self, features, scale, camera, score, look):
        """What the sources say of what is unusual in the missing maps, (N, C, H, W)."""
        size, stride, count = features.shape[-2:], self.strides[scale], self.hypotheses
        found = look.at(self.depths, size, stride)
        score = _resized(score, size)
        depth = self._depth_score(score[:, :count], found)[:, None]  # (N, 1, J, H, W)
        kind, age = (x.to(features.device) for x in (look.sources.kind, look.sources.age.float()))
        of_kind = score[:, count : count + KINDS].gather(
            1, kind[:, :, None, None].expand(-1, -1, *size)
        )  # (N, K, H, W)
        source = (of_kind + self.age_score * age[:, :, None, None])[:, :, None]
        logits = (depth + source).masked_fill(~found.seen, -torch.inf).flatten(1, 2)  # (N, K·J, H, W)
        share = torch.cat([logits, score[:, -1:]], dim=1).softmax(dim=1)
        warped, _ = self._warp(look, found, share[:, :-1], look.sources.index, size)
        return warped

    def _depth_score(self, learnt, found: Hypotheses):
        """The score of each hypothesis, (N, J, H, W): planes of about the ground's depth first, nothing being behind
        it, but not by much; plus what was learnt."""
        near = found.ground.clamp(max=FAR_GROUND)[:, None]
        away = (self.depths[:, None, None].log() - near.log()) / 0.7  # (N, J − 1, H, W)
        planes = -self.steepness * torch.where(away > 0, 4 * away.square(), away.square())
        return F.pad(planes, (0, 0, 0, 0, 0, 2)) + learnt

    def _refine(self, original, base, camera, keys):
        """Attention from the base to every source as it would look from here, and the decoder."""
        with annotate("temporal_completion.attend"):
            attended = base + self.attention(
                original + base, camera, keys.maps, keys.camera, keys.table, key_age=keys.age, key_mask=keys.covered
            )
        return attended + self.decoder(attended)

    def _keys(self, size, score, look):
        """Each source in the missing view, at the resolution of keys."""
        side, device, sources = self.kv_downsample, score.device, look.sources
        size = self._key_size(size)
        look = look.pooled(max(side // look.coarser_than(self.stride), 1))
        found = look.at(self.depths, size, self.stride * side)
        query, slot = sources.pairs
        row = query.to(device), slot.to(device)
        depth = self._depth_score(score[:, : self.hypotheses], found)[row[0]]
        weights = depth.masked_fill(~found.seen[row], -1e4).softmax(dim=1) * found.seen[row]
        one = Hypotheses(found.projection[row][:, None], found.depths, found.seen[row][:, None], found.ground[row[0]])
        maps, coverage = self._warp(look, one, weights, sources.index[query, slot][:, None], size)
        table = torch.full_like(sources.index, -1)
        table[query, slot] = torch.arange(len(query))
        table.masked_fill_(sources.index < 0, -1)
        of, age = (x[query, slot].to(device) for x in (sources.of, sources.age.float()))
        return _Keys(maps, of, age, (coverage > 0.05).flatten(1), table.to(device))

    def _key_size(self, size):
        return tuple(-(-n // self.kv_downsample) for n in size)

    def _warp(self, look, found, weights, index, size):
        """One call for targets whose hypotheses (N, K, J) have sources `index` (N, K); weights (N, K·J, H, W)."""
        index = index.to(look.maps.device)[..., None].masked_fill(~found.seen.any(-1).any(-1), -1)
        return multi_depth_warp(
            look.maps,
            found.projection.flatten(1, 2),
            found.depths.repeat(found.projection.shape[1]),
            weights=weights,
            source_index=index.flatten(1),
            output_size=size,
            backend=self.backend,
        )

    def _fuse(self, original, completion, scale):
        with annotate("temporal_completion.fuse"):
            gate_logits = self.gate[scale](torch.cat([original, completion], dim=1))
            return gated_fusion(original, completion.to(original.dtype), gate_logits, backend=self.backend)


@dataclass(frozen=True, eq=False)
class _Look:
    """The source maps of a scale, and how many image pixels a cell of theirs has."""

    maps: torch.Tensor  # (S, C, h, w)
    stride: int
    sources: Sources

    def at(self, depths, size, stride) -> Hypotheses:
        return hypothesize(self.sources, depths, size, stride, tuple(self.maps.shape[-2:]), self.stride)

    def coarser_than(self, stride) -> int:
        return self.stride // stride

    def pooled(self, side) -> "_Look":
        return _Look(pooled(self.maps, side), self.stride * side, self.sources)


@dataclass(frozen=True, eq=False)
class _Keys:
    """What the missing cameras attend to: S maps."""

    maps: torch.Tensor  # (S, C, h, w)
    camera: torch.Tensor  # (S,) int
    age: torch.Tensor  # (S,) seconds
    covered: torch.Tensor  # (S, h·w) bool
    table: torch.Tensor  # (N, K) into the maps, −1 = none


def _resized(score, size):
    if score.shape[-2:] == tuple(size):
        return score
    return F.interpolate(score, size=size, mode="bilinear", align_corners=False)

"""Completion as one graph: `torch.export` and full-graph `torch.compile` of a rig that is running."""

import torch
from torch import nn

from ..history import HistoryFrame, HistoryQueue, PyramidHistory, narrowed, pooled
from ..rig import RigFrame
from .cascade import CompletionCascade

State = dict[str, torch.Tensor | list[torch.Tensor]]


class StreamingCompletion(nn.Module):
    """One moment of `CompletionCascade.stream` whose shapes hang on no value and whose history comes in and goes out.

    Stage 1 and 3 work on the maps of every camera, and those of the missing ones are kept: more work than `stream`
    does, which works on the missing ones alone, for the same features up to rounding. Any mask, poses, scenes and gaps
    in time run through the same graph:

        step = StreamingCompletion(cascade.eval())
        state = step.start(images)
        program = torch.export.export(step, (images, missing, image_T_ego, world_T_ego, timestamp, scene, state))
        features, state = program.module()(images, missing, image_T_ego, world_T_ego, timestamp, scene, state)

    Sizes of batch, rig and images are those of the example. A program that was made on a GPU calls the operators of
    `rigfuse.kernels`, which has to be imported where it is loaded.

    Args:
        cascade: in evaluation mode; shared, not copied.
    """

    def __init__(self, cascade: CompletionCascade):
        super().__init__()
        self.cascade = cascade
        self.train(cascade.training)

    @torch.no_grad()
    def start(self, images: torch.Tensor) -> State:
        """The state of a rig that has seen nothing yet, for images like these (B, V, 3, H, W), whose values are not
        read.

        Its tensors: `features` of each scale that stage 1 reads, (T, B, V, C, h, w), and, where they are stored as
        int8, their `scales` (T, B, V, C, 1, 1); `available` (T, B, V) bool; `image_T_ego`, `world_T_ego` and
        `timestamp` of the T moments, the newest first; and `scene` (B,) of the newest.
        """
        if self.cascade.temporal is None:
            return {}
        history, (batch, views) = self.cascade.temporal.new_history(), images.shape[:2]
        moments, pose = history.length, torch.eye(4, dtype=torch.float64)
        features, scales = [], []
        for x in self._read(self.cascade.extract(torch.zeros_like(images[:1, :1])), history):
            stored, scale = narrowed(x, _queues(history)[0].dtype)
            features.append(stored.new_zeros(moments, batch, views, *x.shape[2:]))
            if scale is not None:
                scales.append(scale.new_ones(moments, batch, views, *scale.shape[2:]))
        return dict(
            features=features,
            scales=scales,
            available=torch.zeros(moments, batch, views, dtype=torch.bool),
            image_T_ego=pose.repeat(moments, batch, views, 1, 1),
            world_T_ego=pose.repeat(moments, batch, 1, 1),
            timestamp=torch.zeros(moments, batch, dtype=torch.float64),
            scene=torch.full((batch,), -1),
        )

    def forward(
        self,
        images: torch.Tensor,
        missing: torch.Tensor,
        image_T_ego: torch.Tensor,
        world_T_ego: torch.Tensor,
        timestamp: torch.Tensor,
        scene: torch.Tensor,
        state: State,
    ) -> tuple[list[torch.Tensor], State]:
        """Completes one moment.

        Args:
            images: (B, V, 3, H, W), normalised; those of missing cameras are not read.
            missing: (B, V) bool, on the device of the images.
            image_T_ego, world_T_ego, timestamp: of the rig at this moment, see `RigFrame`; on the CPU.
            scene: (B,) int64 on the CPU, at least 0; another number than a moment ago means no common history.
            state: from `start`, or from the moment before. It is not written to.

        Returns:
            for each stride (B, V, C, h, w), completed, and the state for the next moment.
        """
        if self.cascade.training:
            raise ValueError("StreamingCompletion: the cascade is in training mode, needs evaluation mode: .eval()")
        cascade, frame = self.cascade, RigFrame(image_T_ego, world_T_ego, timestamp, ("",) * len(images))
        original = cascade.extract(torch.where(missing[:, :, None, None, None], 0, images))
        history, guidance = None, cascade.guidance([frame])
        if cascade.temporal is not None:
            history = self._history(state, timestamp, scene)
            guidance = cascade.guidance([history.frames[0].frame, frame])
            if guidance is not None:  # that of another scene's motion says nothing
                guidance = guidance.masked_fill((scene != state["scene"])[:, None, None], torch.nan)
        completed, _, _ = cascade.complete(original, missing, frame, history, trajectory=guidance, every=True)
        return completed, {} if history is None else self._next(state, history, original, missing, frame, scene)

    def _history(self, state, timestamp, scene):
        """The state as a history, from which those that cannot be the past of this moment are gone."""
        history = self.cascade.temporal.new_history()
        gap = timestamp - state["timestamp"][0]
        continues = (scene == state["scene"]) & (gap > 0) & (gap <= _queues(history)[0].max_gap)
        names = ("",) * len(scene)
        for level, queue in enumerate(_queues(history)):
            queue.fill(
                HistoryFrame(
                    state["features"][level][step],
                    state["available"][step] & continues[:, None],
                    RigFrame(*(state[name][step] for name in ("image_T_ego", "world_T_ego", "timestamp")), names),
                    state["scales"][level][step] if state["scales"] else None,
                )
                for step in range(queue.length)
            )
        return history

    def _next(self, state, history, original, missing, frame, scene):
        """The state after this moment."""
        queues = _queues(history)
        stored, scales = zip(*(narrowed(x, queues[0].dtype) for x in self._read(original, history)))
        after = lambda now, past: torch.cat([now[None], past[:-1]])  # noqa: E731
        available = torch.stack([then.available for then in history.frames])
        return dict(
            features=[after(now, past) for now, past in zip(stored, state["features"])],
            scales=[after(now, past) for now, past in zip(scales, state["scales"])],
            available=after(~missing.cpu(), available),
            image_T_ego=after(frame.image_T_ego, state["image_T_ego"]),
            world_T_ego=after(frame.world_T_ego, state["world_T_ego"]),
            timestamp=after(frame.timestamp, state["timestamp"]),
            scene=scene.clone(),
        )

    def _read(self, features, history):
        """What stage 1 remembers of the features of every scale."""
        if not self.cascade.temporal.every_scale:
            return [self.cascade.for_temporal(features)]
        return [pooled(x, history.pool) for x in features]


def _queues(history: HistoryQueue | PyramidHistory) -> list[HistoryQueue]:
    return history.queues if isinstance(history, PyramidHistory) else [history]

"""A golden set of the driving head as a head with its weights, moments and truth."""

import numpy as np
import torch

from rigfuse.modules.rig import RigFrame
from rigfuse.modules.sparse_drive.head import HeadConfig, as_upstream
from rigfuse.modules.sparse_drive.upstream_names import convert, head_name


def golden_config(settings) -> HeadConfig:
    """The configuration of a set, by its about.json."""
    same = settings["unchanged"]
    parts = [settings["embed_dims"] // share for share in (2, 8, 8, 4)]
    assert settings["box_encoder_parts"] == parts, "the box encoder here has parts of these widths alone"
    config = HeadConfig(
        channels=settings["embed_dims"],
        heads=settings["heads"],
        levels=len(settings["strides"]),
        cameras=tuple(f"camera {index}" for index in range(settings["cameras"])),
        max_gap=same["max_time_interval"],
        standard_interval=same["default_time_interval"],
    )
    as_upstream(config, front="camera 0")
    for decoder, name in ((config.detection, "det"), (config.lines, "map")):
        decoder.anchors, decoder.kept = settings[f"{name}_anchors"], settings[f"{name}_temporal"]
        decoder.layers, decoder.single_frame_layers = settings["decoder_layers"], settings["single_frame_layers"]
        decoder.decoupled, decoder.decay = same["decoupled"][name], same["confidence_decay"]
        decoder.deformable.groups = settings["groups"]
    config.detection.learned_keypoints = same["learned_keypoints"]
    config.lines.points, config.lines.learned_keypoints = same["line_points"], same["line_learned"]
    motion = config.motion
    motion.layers, motion.queue = settings["motion_layers"], settings["queue_length"]
    motion.agents, motion.lines = settings["motion_num_det"], settings["motion_num_map"]
    motion.modes, motion.steps = same["fut_modes"], same["fut_steps"]
    motion.plan_modes, motion.plan_steps = same["ego_modes"], same["ego_steps"]
    motion.decoupled, motion.track_threshold = same["decoupled"]["motion"], same["tracking_threshold"]
    return config


def golden_head(folder):
    """The head with the set's weights, in evaluation mode."""
    config = golden_config(folder.settings)
    head = config.build()
    weights = {name: torch.from_numpy(value) for name, value in folder.load("weights").items()}
    converted = convert(weights, head.state_dict(), lambda name: head_name(name, config))
    head.load_state_dict(converted)
    return head.eval()


class Moments:
    """The inputs of a set, moment by moment."""

    def __init__(self, folder):
        self.arrays = folder.load("inputs")
        self.count = folder.settings["frames"]
        width, height = folder.settings["image_wh"]
        self.image_size = (height, width)
        self.levels = len(folder.settings["strides"])

    def array(self, moment: int, name: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[f"frame{moment}/{name}"]))

    def maps(self, moment: int) -> list[torch.Tensor]:
        return [self.array(moment, f"feature_maps/{level}") for level in range(self.levels)]

    def frame(self, moment: int) -> RigFrame:
        projection = self.array(moment, "projection_mat").double()
        pose, time = (self.array(moment, name).double() for name in ("T_global", "timestamp"))
        return RigFrame(projection, pose, time, ("",) * len(time))

    def command(self, moment: int) -> torch.Tensor:
        return self.array(moment, "gt_ego_fut_cmd").argmax(-1)

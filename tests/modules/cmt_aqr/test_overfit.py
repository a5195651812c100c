"""The whole detector, with routing, learns four frames by heart: everything from points to losses works together."""

import torch
from torch import nn

from rigfuse.modules.backbones import BackboneConfig
from rigfuse.modules.cmt_aqr.aqr import AQRConfig
from rigfuse.modules.cmt_aqr.detector import DetectorConfig
from rigfuse.modules.cmt_aqr.transformer import DecoderConfig
from rigfuse.modules.detection.batch import DetectionInput
from rigfuse.modules.lidar.second import LidarConfig
from rigfuse.modules.rig import ImageAugmentation, nuscenes_like_rig

RANGE = (-12.8, -12.8, -3.0, 12.8, 12.8, 5.0)
RIG = nuscenes_like_rig().augmented(ImageAugmentation(resize=0.04, crop=(8, 4, 48, 32)))
WEIGHTS = dict(cls=2.0, box=0.25, dn_cls=2.0, dn_box=0.25)
FRAMES, OBJECTS = 4, 4


def frames():
    """Frames with objects of all classes, far from one another, on whose sides lie points; images are noise."""
    boxes, points, labels = [], [], []
    for _ in range(FRAMES):
        cells = torch.randperm(16)[:OBJECTS]  # of a coarse grid
        place = torch.stack([cells % 4, cells // 4], dim=1) * 6.0 - 9.0 + torch.rand(OBJECTS, 2) * 2
        size = 1 + 2 * torch.rand(OBJECTS, 3)
        box = torch.cat([place, torch.rand(OBJECTS, 1), size, torch.rand(OBJECTS, 1) * 6, torch.randn(OBJECTS, 2)], 1)
        inside = box[:, None, :3] + (torch.rand(OBJECTS, 25, 3) - 0.5) * size.amin(1)[:, None, None] * 0.7
        ground = torch.rand(60, 3) * torch.tensor([25.0, 25.0, 0.2]) - torch.tensor([12.5, 12.5, 1.0])
        xyz = torch.cat([inside.flatten(0, 1), ground])
        boxes.append(box)
        points.append(torch.cat([xyz, torch.rand(len(xyz), 1), torch.zeros(len(xyz), 1)], dim=1))
        labels.append(torch.randint(10, (OBJECTS,)))
    images = torch.randn(FRAMES, 6, 3, 32, 48)
    image_T_ego = RIG.image_T_ego.expand(FRAMES, -1, -1, -1)
    return DetectionInput(images, image_T_ego, points, boxes, labels, [str(frame) for frame in range(FRAMES)])


def found_and_said(detections, batch, score=0.3, metres=1.0):
    """How many objects are found: a box of the right class within a metre; and how many boxes are said."""
    found, said = 0, 0
    for detection, boxes, labels in zip(detections, batch.boxes, batch.labels):
        sure = detection.scores > score
        apart = torch.cdist(detection.boxes[sure][:, :2], boxes[:, :2])
        right = (apart < metres) & (detection.labels[sure][:, None] == labels)
        found, said = found + int(right.any(0).sum()), said + int(sure.sum())
    return found, said


def test_four_frames_are_learned_by_heart():
    torch.manual_seed(0)
    batch = frames()
    config = DetectorConfig(channels=32, queries=16, depths=8, denoising_groups=4)
    config.camera = BackboneConfig("tiny", None, -1, False)
    config.lidar = LidarConfig((1.6, 1.6, 2.0), channels=(16,), blocks=1, second=(32, 32), layers=0, frozen_stages=-1)
    config.lidar.norm_eval = False
    config.decoder = DecoderConfig(2, 2, 64, dropout=0.0)
    config.aqr = AQRConfig(channels=32, heads=2, feedforward=32, window_sizes=(2, 5))
    model = config.build((32, 48), RANGE, backend="definition").train()  # the fastest at this size
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.1
    steps, rate = 160, 4e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        losses = model(batch).losses
        optimizer.zero_grad()
        sum(WEIGHTS[name] * loss for name, loss in losses.items()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    found, said = found_and_said(model.eval().detect(batch), batch)
    assert found > 0.9 * FRAMES * OBJECTS and said < 1.3 * FRAMES * OBJECTS

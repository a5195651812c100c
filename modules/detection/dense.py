"""Asks every cell of a bird's-eye-view (BEV) map what stands there, beside what queries find in it."""

from collections.abc import Sequence

import torch
from torch import nn

from ..centres import PRIOR_BIAS, add_peaks, peak_loss
from ..maps_layout import MapLayout
from .boxes import DETECTION_CLASSES, check_ground_truth, encode_boxes

_BOX = slice(2, 8)  # of an encoded box: z, size, yaw


class DenseHead(nn.Module):
    """Dense supervision of a BEV map: centres, and the boxes at them (CenterPoint, Yin et al. 2021).

    For training only. Queries tell a map little at first, for they do not know yet where to look; this tells every cell
    from the first step, as auxiliary dense heads do elsewhere (Co-DETR, Zong et al. 2023). A point-wise layer, so that
    what it needs has to be in the map.

    Args:
        channels: C of the map.
        layout: where the map lies.
    """

    def __init__(self, channels: int, layout: MapLayout):
        super().__init__()
        self.layout = layout
        self.heat = nn.Conv2d(channels, len(DETECTION_CLASSES), 1)
        self.boxes = nn.Conv2d(channels, 8, 1)  # offset of the centre (u, v) in cells, z, log sizes, sin and cos of yaw
        nn.init.constant_(self.heat.bias, PRIOR_BIAS)

    def losses(
        self,
        bev: torch.Tensor,
        boxes: Sequence[torch.Tensor],
        labels: Sequence[torch.Tensor],
        known: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Computes `dense_cls`, the focal loss of the centres, and `dense_box`, the L1 of the boxes at them, scalars.

        Args:
            bev: (B, C, H, W), gets gradients.
            boxes, labels: as for `detection_losses`; a box whose centre is not on the map, or that is not finite, does
                not count.
            known: (B,) bool; a sample of which it is False does not count: its map was made of nothing.
        """
        check_ground_truth("DenseHead.losses", boxes, labels)
        heat, said = self.heat(bev).float(), self.boxes(bev).float()
        target, rows, places = torch.zeros_like(heat), [], []
        for sample, (box, label) in enumerate(zip(boxes, labels)):
            cells, code = self.layout.bev_cells(box[None, :, :3])[0], encode_boxes(box)[:, _BOX]
            there = cells.isfinite().all(1) & code.isfinite().all(1) & known[sample]
            cells, code, label, size = cells[there], code[there], label[there], box[there, 3:5]
            u, v = cells.round().long().unbind(-1)
            add_peaks(target[sample], cells.round(), label, size.amin(1) / self._cell())
            rows.append(torch.cat([cells - cells.round(), code.float()], dim=1))
            places.append(torch.stack([torch.full_like(u, sample), v, u], dim=1))
        rows, places = torch.cat(rows), torch.cat(places)
        found = said[places[:, 0], :, places[:, 1], places[:, 2]]
        asked = known[:, None, None, None]
        return dict(dense_cls=peak_loss(heat, target, asked), dense_box=(found - rows).abs().sum() / max(len(rows), 1))

    def _cell(self):
        """The side of a cell along x, metres."""
        low, high = self.layout.point_range[0], self.layout.point_range[3]
        extent = self.layout.bev_extent or (high - low,)
        return extent[0] / self.layout.bev_shape[1]

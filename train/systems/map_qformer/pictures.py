"""Pictures of map detection: lines on the images and from above, what is found on the left, the truth on the right."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ....modules.map_qformer.network import MapQFormerConfig
from ...pictures import LINE_COLOURS, by_place, draw_path, on_ground, show_image
from .data import MapBatch


def draw_lines(
    batch: MapBatch, index: int, found: tuple[torch.Tensor, torch.Tensor, torch.Tensor], config: MapQFormerConfig,
    threshold: float = 0.3,
) -> Figure:  # fmt: skip
    """Draws one sample of a batch.

    Args:
        batch: images normalised.
        index: of the sample.
        found: lines, labels and scores, see `lines_of`.
        config: of the network.
        threshold: score from which on a line is drawn.
    """
    lines, labels, scores = (values.cpu() for values in found)
    sure = scores >= threshold
    truth = batch.truth.lines[index][:, 0].cpu(), batch.truth.labels[index].cpu()
    figure = Figure(figsize=(16, 7), layout="constrained")
    sides = figure.subfigures(1, 2)
    for side, title, shown in zip(sides, ("predicted", "true"), ((lines[sure], labels[sure]), truth)):
        side.suptitle(title, fontsize=10)
        _draw(side, batch, index, *shown, config)
    return figure


def _draw(figure, batch, index, lines: Sequence[torch.Tensor], labels, config):
    """Images above in two rows, the view from above below: ahead is to the right."""
    axes = figure.subplot_mosaic([[0, 1, 2], [3, 4, 5], [6, 6, 6]], height_ratios=(1, 1, 2))
    colours = [LINE_COLOURS.get(config.classes[label], "grey") for label in labels]
    for place in range(6):
        axes[place].set_axis_off()
    cameras = config.images.cameras
    for place, name in enumerate(by_place(cameras)[:6]):
        camera = cameras.index(name)
        show_image(axes[place], batch.images[index, camera], name)
        for line, colour in zip(lines, colours):
            points = on_ground(line, config.images.ground)
            draw_path(axes[place], points, batch.frame.image_T_ego[index, camera].cpu(), color=colour, linewidth=0.9)
    for line, colour in zip(lines, colours):
        axes[6].plot(*line.T.numpy(), color=colour, linewidth=1.2)
    axes[6].plot([3.5, 0, 0, 3.5], [0, 1, -1, 0], color="black", linewidth=1)  # the car, its tip ahead
    half = [0.5 * side for side in config.line_range]
    axes[6].set(xlim=(-half[0] - 5, half[0] + 5), ylim=(-half[1] - 3, half[1] + 3), aspect="equal")
    axes[6].tick_params(labelsize=6)

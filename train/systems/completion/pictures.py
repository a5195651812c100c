"""Pictures of completion: errors by camera, and a feature map before, after and true."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ....modules.completion.cascade import CompletionCascade
from ....modules.window import RigWindow


def draw_errors(errors: dict[str, torch.Tensor], cameras: Sequence[str], path: Path) -> None:
    """Draws the relative error by missing camera: a bar for each method, the spread over runs as whiskers.

    errors: method → (cameras, runs).
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(ylabel="relative L2 error")
    width = 0.8 / len(errors)
    for place, (method, values) in enumerate(errors.items()):
        x = torch.arange(len(cameras)) + (place - len(errors) / 2 + 0.5) * width
        deviation = values.std(1, correction=0) if values.shape[1] > 1 else None
        axes.bar(x, values.mean(1), width, yerr=deviation, label=method)
    axes.set_xticks(range(len(cameras)), [camera.removeprefix("CAM_") for camera in cameras], fontsize=8)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


@torch.no_grad()
def draw_features(model: CompletionCascade, window: RigWindow, cameras: Sequence[str], path: Path) -> None:
    """Draws for each camera, absent in turn: its image, and its features without completion, completed, and true. The
    three strongest directions of the true features are red, green and blue."""
    model.eval()
    scale = model.temporal_scale if model.temporal is not None else -1
    figure = Figure(figsize=(11, 1.9 * len(cameras)), layout="constrained")
    grid = figure.subplots(len(cameras), 4, squeeze=False)
    for row, camera in zip(grid, cameras):
        index = model.dropout.cameras.index(camera)
        output = model(window, drop=[camera])
        maps = [source[scale][0, index].float() for source in (output.original, output.features, output.teacher)]
        for axes, picture in zip(row, [_image(window.images[0, -1, index]), *_coloured(maps)]):
            axes.imshow(picture)
            axes.set_axis_off()
        row[0].set_title(camera, fontsize=9)
    for axes, title in zip(grid[0][1:], ("without completion", "completed", "true")):
        axes.set_title(title, fontsize=9)
    figure.savefig(path, dpi=110)


def _image(image):
    image = image.float().cpu()
    low, high = image.amin(), image.amax()
    return ((image - low) / (high - low).clamp(min=1e-6)).permute(1, 2, 0).numpy()


def _coloured(maps):
    """Colours maps (C, H, W) by the principal axes of the last one's cells: (H, W, 3) in [0, 1] each."""
    cells = maps[-1].flatten(1).T.cpu()
    mean = cells.mean(0)
    axes = torch.linalg.svd(cells - mean, full_matrices=False).Vh[:3]
    low, high = torch.quantile((cells - mean) @ axes.T, torch.tensor([0.02, 0.98]), dim=0)
    for x in maps:
        colours = ((x.flatten(1).T.cpu() - mean) @ axes.T - low) / (high - low).clamp(min=1e-6)
        yield colours.clamp(0, 1).unflatten(0, x.shape[1:]).numpy()

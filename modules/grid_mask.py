"""GridMask: an augmentation that blanks a grid of squares (Chen et al. 2020, arXiv:2001.04086)."""

import torch


def grid_mask(images: torch.Tensor, probability: float, ratio: float = 0.5) -> torch.Tensor:
    """Sets a grid of squares to 0 with a probability, the same grid in all images.

    The grid has a period of 2 to H − 1 pixels and starts anywhere; of each period the share `ratio` along both axes is
    blank, so a quarter of the pixels at 0.5. The draws come from torch's global generator of the CPU.

    Args:
        images: (..., H, W), normalised: 0 is grey. Gets gradients.
        probability: in [0, 1].
        ratio: in (0, 1).

    Returns:
        Of the same shape; `images` itself where nothing is drawn.
    """
    height, width = images.shape[-2:]
    if float(torch.rand(())) >= probability or height < 3:
        return images
    period = int(torch.randint(2, height, ()))
    blank = min(max(int(period * ratio + 0.5), 1), period - 1)
    rows, columns = ((torch.arange(size) + int(torch.randint(period, ()))) % period < blank for size in (height, width))
    kept = ~(rows[:, None] & columns)
    return images * kept.to(images)

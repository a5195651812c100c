"""Released weights of SparseDrive small, whole: backbone, neck, head and depth branch, by the names of this toolkit."""

import torch

from ....modules.sparse_drive.head import as_upstream
from ....modules.sparse_drive.network import SparseDriveConfig
from ....modules.sparse_drive.upstream_names import convert, model_name

FRAME = "its frame is the LiDAR's, x right and y ahead: take the configurations that end in _upstream"


def import_whole(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of `SparseDriveConfig().build()`, with `as_upstream` on its head, from those of upstream's stage 2.

    Args:
        state: tensors by upstream's names.

    Raises:
        ValueError: a name finds no place, a weight stays unfilled, or a shape is another; all are listed.
    """
    config = SparseDriveConfig()
    as_upstream(config.head)
    with torch.device("meta"):
        own = config.build().state_dict()
    weights = convert(state, own, lambda name: model_name(name, config.head))
    shapes = {name: (tuple(weight.shape), tuple(own[name].shape)) for name, weight in weights.items()}
    wrong = [f"{name} is {found}, needs {needed}" for name, (found, needed) in shapes.items() if found != needed]
    if wrong:
        raise ValueError(f"the weights of sparsedrive do not fit: {'; '.join(wrong)}")
    return weights

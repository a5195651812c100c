"""What the tests of the pooled metrics run on every rank."""

import json
from pathlib import Path


def compute_share(world, metrics, folder):
    """`metrics[name][rank]` is a metric with this rank's samples; writes what `compute_over_ranks` gives or raises."""
    result = {}
    for name, shares in metrics.items():
        try:
            result[name] = shares[world.rank].compute_over_ranks()
        except ValueError as error:
            result[name] = str(error)
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(result, allow_nan=False))

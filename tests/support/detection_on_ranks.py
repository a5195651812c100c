"""What the test of the detection evaluation runs on every rank."""

import json
from pathlib import Path

from rigfuse.train.metrics.detection import evaluate_detection


def evaluate_share(world, found, root, split, folder):
    """Every rank has its share; the first sample is on both, as where a share is filled up."""
    tokens = sorted(found)
    share = {token: found[token] for token in (tokens[0], *tokens[world.rank :: world.size])}
    figures = evaluate_detection(share, root, None, split)
    (Path(folder) / f"{world.rank}.json").write_text(json.dumps(figures))

"""Numbers that upstream code computed on made-up inputs; they lie beside the checkout, never in it."""

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

DATA = Path(os.environ.get("RIGFUSE_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")


@dataclass(frozen=True)
class GoldenSet:
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def about(self) -> dict:
        return json.loads((self.folder / "about.json").read_text())

    @property
    def settings(self) -> dict:
        return self.about["settings"]

    def load(self, file: str) -> dict[str, np.ndarray]:
        """The arrays of `file`.npz."""
        with np.load(self.folder / f"{file}.npz") as arrays:
            return dict(arrays)


def golden_sets(kind: str) -> list[GoldenSet]:
    """Every set of that kind, by its about.json; none where the data are absent."""
    sets = map(GoldenSet, sorted(about.parent for about in (DATA / "golden").glob("*/about.json")))
    return [golden for golden in sets if golden.about["kind"] == kind]

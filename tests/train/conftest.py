"""Real data, where it lies beside the project or where RIGFUSE_TEST_DATA says; tests that want it skip elsewhere."""

import os
from pathlib import Path

import pytest

from support.once import made_once

DATA = Path(os.environ.get("RIGFUSE_TEST_DATA") or Path(__file__).parents[3] / "shared" / "data")


def _root(name):
    root = DATA / name
    if not root.is_dir():
        pytest.skip(f"no {name} data at {root}; set RIGFUSE_TEST_DATA to the folder that has it")
    pytest.importorskip("nuscenes", reason="needs nuscenes-devkit: pip install '.[nuscenes]'")
    return root


@pytest.fixture(scope="session")
def nuscenes_root():
    return _root("nuscenes")


@pytest.fixture(scope="session")
def ddad_root():
    return _root("ddad")


@pytest.fixture(scope="session")
def nuscenes(nuscenes_root):
    from rigfuse.train.data import open_drives

    return open_drives(nuscenes_root)


@pytest.fixture(scope="session")
def ddad(ddad_root):
    from rigfuse.train.data import open_drives

    return open_drives(ddad_root)


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """A generated world: one drive to train on, one to evaluate on, three key frames each, two scans between them."""
    from rigfuse.train.world import WorldSettings, make_world

    pytest.importorskip("nuscenes", reason="needs nuscenes-devkit: pip install '.[nuscenes]'")
    small = WorldSettings(scenes=2, samples=3, width=64, sweeps=2)
    return made_once(tmp_path_factory, "small-world", lambda root: make_world(root, small, workers=0))

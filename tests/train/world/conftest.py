"""A small generated world, and what tests ask of it."""

import json
import os
import shutil

import pytest

from rigfuse.train.world import WorldSettings, make_world
from rigfuse.train.world.scene import Scene
from support.once import made_once

SETTINGS = WorldSettings(scenes=2, samples=3, width=320)


@pytest.fixture(scope="session")
def settings():
    return SETTINGS


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    return made_once(tmp_path_factory, "world", lambda root: make_world(root, SETTINGS, workers=0))


@pytest.fixture(scope="session")
def scene():
    """The first scene of `world`."""
    return Scene(SETTINGS.seed, 0, SETTINGS.samples)


@pytest.fixture(scope="session")
def long_scenes():
    """Six drives of 20 s, each through its own town; the second is one of validation."""
    return [Scene(seed=3, index=index, samples=40) for index in range(6)]


@pytest.fixture
def altered(world, tmp_path):
    """A copy to break. Files are linked, so what is changed has to be unlinked first: see `rewrite`."""
    return shutil.copytree(world, tmp_path / "altered", copy_function=os.link)


@pytest.fixture(scope="session")
def rows(world):
    """Function of a table's name: its rows in `world`."""
    return lambda table, root=world: json.loads((root / "v1.0-mini" / f"{table}.json").read_text())


@pytest.fixture(scope="session")
def nusc(world):
    return pytest.importorskip("nuscenes").NuScenes("v1.0-mini", str(world), verbose=False)

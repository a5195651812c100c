"""The shape of the code: imports point one way, operations look alike, importing is cheap."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from rigfuse.train.systems import EXPERIMENTS, SYSTEMS, experiment
from support.settings import numbers

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "modules", "train", "bench"]  # each imports only itself and what stands before it
SHARED = {"detection", "lidar"}  # folders in modules/ that are no system's
ROOMS = {path.parent.name for path in ROOT.glob("modules/*/__init__.py")} - SHARED | set(SYSTEMS)
COMPOSED = {("sparse_drive", "completion")}  # a system that is built on another: driving has completion in front
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_names(path: Path) -> set[tuple[str, ...]]:
    """What a file imports from the four folders, as paths from the root: ("modules", "rig", "Rig")."""
    found, package = set(), path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            names = [(*base, *(node.module.split(".") if node.module else ()), alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        else:
            continue
        if isinstance(node, ast.Import) or not node.level:
            bare = next((name for name in names if name[0] in LAYERS), None)
            assert bare is None, f"{path.name}: bare import of {bare[0]}; write rigfuse.{bare[0]}"
            names = [name[1:] for name in names if name[0] == "rigfuse"]
        found |= set(names)
    return found


def imported_layers(path: Path) -> set[str]:
    """The top-level folders that a file imports from."""
    return {name[0] for name in imported_names(path) if name}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    assert imported_layers(path) <= allowed


def test_a_wrong_import_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "kernels" / "warp" / "api.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ...modules import rig\nfrom rigfuse.train import data\nfrom ..runtime import checks\n")
    assert imported_layers(file) == {"modules", "train", "kernels"}


def test_what_may_be_missing_is_asked_for_before_it_is_imported():
    """`import` at the top of a file takes PyTorch, NumPy and what a package round it `require`s, or asks `optional`."""
    unasked = {}
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("modules", "train"):
            known = {"torch", "numpy", "rigfuse", *sys.stdlib_module_names} | required(path)
            nodes = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
            plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
            plain |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
            unknown = {name.split(".")[0] for name in plain} - known
            unasked |= {str(path.relative_to(ROOT)): unknown} if unknown else {}
    assert not unasked


def required(path: Path) -> set[str]:
    """What the packages round a file `require`."""
    packages = [folder / "__init__.py" for folder in path.parents if folder.is_relative_to(ROOT)]
    calls = [
        node
        for package in packages
        if package.exists()
        for node in ast.walk(ast.parse(package.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "require"
    ]
    return {argument.value for call in calls for argument in call.args[1:]}


# ---- systems


def room(path: tuple[str, ...]) -> str | None:
    """The system in whose folder something lies; None = outside all of them."""
    for floor in (("modules",), ("train", "systems")):
        name = path[len(floor)] if path[: len(floor)] == floor and len(path) > len(floor) else None
        if name in ROOMS:
            return name
    return None


def is_foreign(place: tuple[str, ...], name: tuple[str, ...]) -> bool:
    """Whether a file at `place` has no business with what it imports."""
    rooms = room(place), room(name)
    return rooms[1] not in (None, rooms[0]) and rooms not in COMPOSED


def test_systems_are_apart_and_what_they_share_lies_in_none():
    """Commands in train/tools/ and the benchmark may look into every room."""
    foreign = {}
    for path in FILES:
        place = path.relative_to(ROOT).parts
        if place[0] in ("modules", "train") and place[:2] != ("train", "tools"):
            doors = {".".join(name) for name in imported_names(path) if is_foreign(place, name)}
            foreign |= {"/".join(place): doors} if doors else {}
    assert not foreign


def test_a_door_between_rooms_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "train" / "systems" / "completion" / "data.py"
    file.parent.mkdir(parents=True)
    file.write_text("from ..cmt_aqr import data\nfrom ....modules import cmt_aqr\nfrom ....modules.rig import Rig\n")
    assert {room(name) for name in imported_names(file)} == {"cmt_aqr", None}
    assert room(file.relative_to(tmp_path).parts) == "completion"


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_system_has_tiny_siblings_a_metric_and_a_row_in_the_readme(system):
    assert (ROOT / "modules" / system).is_dir()
    names = set(import_module(f"rigfuse.train.systems.{system}.configs").EXPERIMENTS)
    full = {name for name in names if "_tiny" not in name}
    variants = {name for name in names if "_tiny_" in name}  # further stages of a tiny one
    assert full and names - variants == full | {f"{name}_tiny" for name in full}
    assert {name.rpartition("_")[0] for name in variants} <= names
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{system}` |")]
    for name in names:
        made = experiment(name)
        assert f"`{made.metric}`, {dict(min='smaller', max='larger')[made.metric_mode]} is better" in row, name


def test_every_number_of_every_configuration_has_a_range():
    """Or a `validate` of its own: the names below."""
    unbounded = {name for each in EXPERIMENTS for name, limits, _ in numbers(experiment(each)) if limits is None}
    assert unbounded == {"losses", "data.point_range"}


def test_every_folder_of_a_system_is_registered():
    assert {path.parent.name for path in ROOT.glob("train/systems/*/configs.py")} == set(SYSTEMS)


# ---- operations


@pytest.mark.parametrize(
    "operation", [path.parent for path in ROOT.glob("kernels/*/api.py")], ids=lambda path: path.name
)
def test_an_operation_is_six_files_and_backends_never_import_one_another(operation):
    names = {path.stem for path in operation.iterdir() if path.stem not in ("__init__", "__pycache__")}
    assert names == {"api", "definition", "ops", "torch", "triton", "configs"}
    backends = {"definition", "torch", "triton"}
    for backend in backends:
        file = operation / f"{backend}.py"
        for path in [file] if file.exists() else (operation / backend).glob("*.py"):
            imported = {
                part
                for node in ast.walk(ast.parse(path.read_text()))
                if isinstance(node, ast.ImportFrom) and node.level
                for part in [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            }
            assert not imported & (backends - {backend}), f"{path} imports another backend"


def test_the_definitions_are_short():
    for path in ROOT.glob("kernels/*/definition.py"):
        lines = [line for line in path.read_text().splitlines() if line.strip() and not line.strip().startswith("#")]
        assert len(lines) <= 60, f"{path} is no definition any more"


def test_importing_the_operations_is_cheap():
    """Neither triton nor the compiler nor what they bring along; nvtx where there is any."""
    script = (
        "import sys, torch; before = set(sys.modules); sys.modules['triton'] = sys.modules['nvtx'] = None; "
        "import rigfuse.kernels; new = {name for name in set(sys.modules) - before if sys.modules[name]}; "
        "assert not {name.split('.')[0] for name in new} - {'rigfuse', 'importlib'} - sys.stdlib_module_names, new; "
        "assert 'torch._dynamo' not in sys.modules; "
        "out = rigfuse.kernels.gated_fusion(*torch.zeros(3, 1, 2, 2, 2)); assert out.shape == (1, 2, 2, 2)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_transformers_may_find_this_folder_of_kernels():
    """With the repository's root on the path, as `python -m pytest` has it, in whichever order."""
    script = (
        "import os, sys, torch\n"
        "if (child := os.fork()) and os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]): sys.exit('the first fails')\n"
        "import importlib\n"
        "for name in ('kernels', 'rigfuse.kernels')[:: 1 if child else -1]: importlib.import_module(name)\n"
        "import kernels; assert not hasattr(kernels, 'gated_fusion')"
    )
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

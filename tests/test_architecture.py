"""The shape of the code: imports point one way, operations look alike, importing is cheap."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "modules", "train", "bench"]  # each imports only itself and what stands before it
FILES = sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imported_layers(path: Path) -> set[str]:
    """The top-level folders that a file imports from, relative imports resolved."""
    found = set()
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [base + tuple((node.module or alias.name).split(".")) for alias in node.names]
            found |= {name[0] for name in names}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                assert module.split(".")[0] not in LAYERS, (
                    f"{path.name}: bare import of {module}; write rigfuse.{module}"
                )
                if module == "rigfuse" or module.startswith("rigfuse."):
                    found |= set(module.split(".")[1:2])
    return found


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
        assert len(lines) <= 50, f"{path} is no definition any more"


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

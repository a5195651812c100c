"""What a missing package is told as: one line with the command that mends it."""

import subprocess
import sys
from pathlib import Path

import pytest

from rigfuse.kernels.runtime import extras

ROOT = Path(extras.__file__).parents[2]
TRAIN = ("matplotlib", "rich")
COMMANDS = [
    ("train/main.py --config completion_v2_tiny", TRAIN),
    ("train/tools/make_world.py --out nowhere", ("shapely",)),
    ("bench/run.py --list", TRAIN),
    ("bench/gpu_day.py --rehearse --out nowhere", TRAIN),
]


def test_what_is_missing_is_named_with_the_command_that_brings_it(monkeypatch):
    extras.require("train", "torch", "numpy")
    monkeypatch.setitem(sys.modules, "shapely", None)
    with pytest.raises(ImportError, match=r"^needs shapely: pip install '.\[train\]' in a checkout of rigfuse$"):
        extras.require("train", "numpy", "shapely")
    shapely = extras.optional("train", "shapely")
    with pytest.raises(ImportError, match=r"^needs shapely: pip install '.\[train\]'"):
        shapely.box(0, 0, 1, 1)
    assert extras.optional("train", "os.path").join("a", "b") == "a/b"


@pytest.mark.parametrize("command, missing", COMMANDS)
def test_a_command_ends_in_that_one_line(command, missing, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(f"import sys; sys.modules |= dict.fromkeys({missing})")
    (tmp_path / "rigfuse").symlink_to(ROOT)
    script, *arguments = command.split()
    done = subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    line = f"{Path(script).name}: needs {', '.join(missing)}: pip install '.[train]' in a checkout of rigfuse\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", line)

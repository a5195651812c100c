"""What a figure depends on: commit, hardware, versions, clocks.

Where there is no repository, `RIGFUSE_COMMIT` names the commit.
"""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

COMMIT_VARIABLE = "RIGFUSE_COMMIT"
_PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "flash-attn")


def collect(device: torch.device) -> dict:
    """`dirty`: whether what runs differs from `commit`; None where nobody can tell."""
    commit, dirty = _commit()
    return dict(commit=commit, dirty=dirty, hardware=_hardware(device), versions=_versions(), clocks=_clocks(device))


def _run(*command, **options) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit(root: Path = Path(__file__).parents[1]) -> tuple[str | None, bool | None]:
    """The commit, and whether a Python file differs from it or is not in it; other files are not what is measured."""
    commit = _run("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    if commit is None:
        return os.environ.get(COMMIT_VARIABLE), None
    changed = _run("git", "status", "--porcelain", "--", "*.py", cwd=root)
    return commit, None if changed is None else bool(changed)


def _cpu_fields() -> dict[str, list[str]]:
    fields: dict[str, list[str]] = {}
    path = Path("/proc/cpuinfo")
    for name, value in re.findall(r"^([^\t:]+)\s*:\s*(.*)$", path.read_text() if path.exists() else "", re.MULTILINE):
        fields.setdefault(name.strip(), []).append(value)
    return fields


def _hardware(device) -> dict:
    cpu = _cpu_fields().get("model name", [platform.processor() or platform.machine()])[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    hardware = dict(cpu=cpu, cores=cores, threads=torch.get_num_threads())
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        hardware.update(gpu=properties.name, gpu_memory=properties.total_memory)
    return hardware


def _versions() -> dict:
    versions = dict(python=platform.python_version())
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def _clocks(device) -> dict:
    """MHz at the start of the run; for a GPU also what it is allowed to reach."""
    clocks = {}
    if megahertz := [float(value) for value in _cpu_fields().get("cpu MHz", [])]:
        clocks["cpu_mhz"] = round(sum(megahertz) / len(megahertz))
    if device.type == "cuda":
        fields = ["clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"]
        uuid = torch.cuda.get_device_properties(device).uuid
        query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", f"--id=GPU-{uuid}"]
        if (answer := _run("nvidia-smi", *query)) is not None:
            clocks.update({f"gpu_{name}": value.strip() for name, value in zip(fields, answer.split(","))})
    return clocks


def headline(facts: dict) -> str:
    """One line for a person."""
    hardware = facts["hardware"]
    name = hardware.get("gpu") or f"{hardware['cpu']}, {hardware['threads']} threads"
    state = {True: " and uncommitted changes", False: "", None: " (not verified)"}[facts["dirty"]]
    return f"{name} · torch {facts['versions']['torch']} · commit {facts['commit'] or 'unknown'}{state}"


def warning(facts: dict) -> str:
    """Why these results are not to be committed; empty for those of a clean commit."""
    if facts["dirty"] is False:
        return ""
    if facts["dirty"]:
        return "Measured with uncommitted changes: not to be committed, for nobody could measure it again."
    return "Not to be committed before somebody made sure that the files measured were those of the commit."

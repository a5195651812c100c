"""What a figure depends on: commit, hardware, versions, clocks."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("torch", "triton", "numpy", "cupy-cuda13x", "flash-attn")


def collect(device: torch.device) -> dict:
    return dict(commit=_commit(), hardware=_hardware(device), versions=_versions(), clocks=_clocks(device))


def _run(*command, **options) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _commit() -> str | None:
    """The commit that is checked out; `-dirty` when the tree differs from it. None outside a repository."""
    return _run("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*", cwd=Path(__file__).parent)


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
    return f"{name} · torch {facts['versions']['torch']} · commit {facts['commit'] or 'unknown'}"

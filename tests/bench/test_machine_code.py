"""What compiled kernels consist of, and what a call costs, without a GPU."""

import json
import math

import numpy as np
import pytest
import torch

from rigfuse.bench import run
from rigfuse.bench.operation import make_inputs
from rigfuse.bench.operations import OPERATIONS, window_bias_attention
from rigfuse.bench.subject import Place
from rigfuse.bench.subjects import machine_code, overhead

compiles = pytest.mark.compile_only
CPU = torch.device("cpu")


@compiles
def test_loops_are_those_of_the_machine_code():
    """Two loops inside a third; the jump to itself is what the compiler fills the end with."""
    from rigfuse.bench.compilation import Compiled

    jumps = {0x30: "@P0 BRA 0x20", 0x70: "@!P5 BRA 0x50", 0x80: "BRA 0x10", 0x90: "@P1 BRA 0xb0", 0xA0: "BRA 0xa0"}
    lines = [f"        /*{at:04x}*/    {jumps.get(at, 'FADD R1, R2, R3')} ;    /* 0x0 */" for at in range(0, 0xB0, 16)]
    compiled = Compiled("kernel", "sm_90", 32, 0, 0, 1, "\n".join(["\tFunction : kernel", *lines]))
    assert len(compiled.instructions) == 11
    assert compiled.loops == [8, 2, 3]


@compiles
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_kernel_of_an_operation_is_counted(name):
    """Forward and backward, as the public function starts them."""
    rows = machine_code.count(Place(name, "tiny"), "sm_90", torch.bfloat16)
    found = {(row.provider, row.mode, row.metric): row.value for row in rows}
    kernels = {(row.provider, row.mode) for row in rows if row.metric == "registers"}
    differentiated = bool(make_inputs(OPERATIONS[name], "tiny", torch.bfloat16, CPU).leaves)
    assert {mode for _, mode in kernels} == ({"fwd", "bwd"} if differentiated else {"fwd"})
    for kernel, mode in kernels:
        assert 0 < found[kernel, mode, "registers"] <= 255 and found[kernel, mode, "programs"] >= 1
        assert found[kernel, mode, "instructions"] >= found.get((kernel, mode, "loop_instructions"), 1) > 0
    assert any(metric == "loop_instructions" for _, _, metric in found) or not name.endswith("attention")


@compiles
def test_the_command_prints_and_writes_what_it_counted(tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [
        "--machine-code",
        "gated_fusion",
        "--case",
        "tiny",
        "--architecture",
        "sm_80",
        "gfx942",
        "--out",
        str(out),
    ]
    assert run.main(arguments) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["device"] for row in rows} == {"sm_80", "gfx942"} and {row["dtype"] for row in rows} == {"bfloat16"}
    for text in ((out / "report.md").read_text(), capsys.readouterr().out):
        assert "gated_fusion, tiny, sm_80" in text and "gated_fusion_backward" in text


@compiles
def test_a_call_is_timed_without_a_launch(monkeypatch):
    """Every operation comes to its launches, and none of them starts anything: there is no device."""
    from rigfuse.bench import compilation

    started = []
    monkeypatch.setattr(compilation, "_start_nothing", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(overhead, "_WARM_UP", 1)
    monkeypatch.setattr(overhead, "_BATCHES", 2)
    for name in OPERATIONS:
        started.clear()
        found = overhead.microseconds(Place(name, "tiny"), torch.bfloat16)
        assert started and all(len(samples) == 2 and min(samples) > 0 for samples in found.values())
        assert set(found) == ({"fwd"} if name == "trajectory_importance" else {"fwd", "fwd-bwd"})


@compiles
def test_nothing_is_pretended_afterwards():
    from rigfuse.bench.compilation import compile_launches
    from rigfuse.kernels import BackendError, gated_fusion

    images = torch.zeros(3, 1, 16, 4, 4)
    with pytest.raises(ZeroDivisionError):
        compile_launches("sm_90", lambda: gated_fusion(*images) / (1 // 0))
    with pytest.raises(BackendError, match="the tensors are on cpu"):
        gated_fusion(*images, backend="triton")


def careful_by_hand(inputs, rows, columns):
    """(careful, all) tiles, counted one after another from what a window is."""
    centers, maps = inputs.arguments["centers"][0], inputs.arguments["maps"]
    careful = tiles = 0
    for m, (height, width, window) in enumerate(maps):
        order = torch.argsort(centers[:, m, 1], stable=True)
        for queries in order.split(rows):
            touched = set()
            for x, y in centers[queries, m].tolist():
                if x != x or y != y:  # NaN: the query is not on this map
                    continue
                left, top = (math.floor(np.float32(value) + np.float32(0.5)) - window // 2 for value in (x, y))
                if left > -window and left < width:
                    touched |= {row for row in range(top, top + window) if 0 <= row < height}
            for start in range(0, height * width, columns):
                tiles += 1
                cells = range(start, start + columns)
                between = touched and min(touched) * width < cells.stop and cells.start < (max(touched) + 1) * width
                careful += bool(between) or cells.stop > height * width
    return careful, tiles


def test_the_share_of_careful_tiles_is_counted_from_the_windows(monkeypatch):
    from rigfuse.kernels.window_bias_attention import configs

    monkeypatch.setattr(configs, "forward", lambda *arguments: dict(BLOCK_M=4, BLOCK_N=16))
    operation = OPERATIONS["window_bias_attention"]
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        inputs = operation.make_inputs(21, 12, 4, 9, 2, 16, dtype=torch.float32, device=CPU, generator=generator)
        careful, tiles = careful_by_hand(inputs, 4, 16)
        shares = window_bias_attention.careful_tiles(inputs, "sm_90")
        assert shares["careful tiles"] == pytest.approx(careful / tiles) and 0.1 < careful / tiles < 0.95
        assert len(shares) == 1 + len(inputs.arguments["maps"])

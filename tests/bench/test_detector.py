"""The detector's training step: what is frozen costs less and computes the same, and the documents' claim is judged."""

import json

import pytest
import torch

from rigfuse.bench import correctness, memory, options, run
from rigfuse.bench.measure import Effort
from rigfuse.bench.results import Outcome, Row
from rigfuse.bench.subjects import detector
from rigfuse.train.claims import FAILS
from rigfuse.train.data import open_drives
from rigfuse.train.systems import experiment

CPU = torch.device("cpu")
CASE = detector.CASES["tiny"]


@pytest.fixture(scope="module")
def workload():
    return detector.make_workload(CASE, tuple(detector.PROVIDERS), CPU, open_drives(None))


def parameters(call):
    return [p for group in call.optimizer.param_groups for p in group["params"]]


def test_losses_and_gradients_are_those_of_float64(workload):
    """Rounding decides nothing: the same queries are matched, the same voxels filled."""
    single = {name: correctness.compute(workload.build(name, torch.float32), ("step",)) for name in workload.groups}
    losses = {"cls", "box", "dn_cls", "dn_box", "dense_cls", "dense_box"}
    for group in ("unfrozen", "frozen", "unrouted"):
        reference = correctness.compute(workload.build_reference(group), ("step",))
        assert correctness.errors(single[group], reference).worst < 1e-5
        assert len(reference.outputs) == 1 + len(losses)
        assert all(grad.abs().max() > 0 for grad in reference.grads.values())
    assert correctness.errors(single["frozen-checkpointed"], single["frozen"]).worst == 0
    both = [single[name].outputs[0].item() for name in ("frozen", "unfrozen")]
    assert both[0] == pytest.approx(both[1], rel=1e-3) and both[0] != both[1]  # statistics as learned, or of the batch


def test_statistics_are_those_of_the_inputs():
    weights = detector._make_step(CASE, CPU, open_drives(None)).weights
    found = {name: value for name, value in weights.items() if name.endswith(("running_var", "running_mean"))}
    assert len(found) > 50 and all((value != float(name.endswith("var"))).any() for name, value in found.items())


@pytest.mark.parametrize("case", detector.CASES.values(), ids=detector.CASES)
def test_points_are_off_the_sides_of_voxels_and_in_range(case):
    place = detector._points(case, torch.Generator().manual_seed(0)).double()[:, :3]
    voxels = place / torch.tensor(experiment(case.experiment).model.lidar.voxel_size, dtype=torch.float64)
    inside = voxels - voxels.floor()
    assert 0.09 < inside.min() < 0.2 and 0.8 < inside.max() < 0.91
    assert place.norm(dim=1).max() < 1.1 * case.reach and place[:, 2].min() > 0 and place[:, 2].max() < 5


@pytest.mark.parametrize("case", detector.CASES.values(), ids=detector.CASES)
def test_a_provider_freezes_as_its_experiment_does(case):
    for provider in detector.PROVIDERS.values():
        settings, expected = detector._settings(case, provider), experiment(provider.experiment)
        assert settings.optim == expected.optim
        for branch in ("camera", "lidar"):
            own, other = getattr(settings.model, branch), getattr(expected.model, branch)
            assert (own.frozen_stages, own.norm_eval) == (other.frozen_stages, other.norm_eval)


def test_a_step_trains_what_is_not_frozen(workload):
    counts = {}
    for name in detector.PROVIDERS:
        call = workload.build(name, torch.float32)
        before = [p.detach().clone() for p in parameters(call)]
        call.reset()
        losses = call.step("step")
        counts[name] = sum(p.numel() for p in before)
        assert all(loss.isfinite() and not loss.requires_grad for loss in losses)
        assert all(p.grad is None and not torch.equal(p, old) for p, old in zip(parameters(call), before))
    branches = ("img_backbone.", "pts_backbone.", "pts_voxel_encoder.", "pts_middle_encoder.")
    model = experiment(CASE.experiment).build_model()
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(size for name, size in sizes.items() if not name.startswith(branches))
    routing = sum(size for name, size in sizes.items() if name.startswith(("aqr_", "attention_bias_")))
    assert counts == {"unfrozen": sum(sizes.values()), "unrouted": trained - routing} | dict.fromkeys(
        ("frozen", "frozen-checkpointed"), trained
    )


def test_freezing_and_checkpointing_save_memory(workload):
    peak = {name: memory.peak_bytes(workload.build(name, torch.float32), "step", CPU) for name in detector.PROVIDERS}
    assert peak["frozen-checkpointed"] < peak["frozen"] < 0.8 * peak["unfrozen"]


def outcome(time, peak, case="documents"):
    rows = []
    for provider, factor in (("unfrozen", (time, peak)), ("frozen", (1.0, 1.0)), ("unrouted", (1 / time, 1 / peak))):
        for metric, value in zip(("time_ms", "peak_bytes"), factor):
            place = ("detector", "step", case, provider, "cpu", "float32", "step", metric)
            rows.append(Row(*place, value * 1e6, [value * 1e6] * 3))
    return Outcome(rows=rows, sizes={("step", case): {}})


@pytest.mark.parametrize(
    "time, peak, holds", [(1.31, 1.44, ["holds"] * 2), (1.29, 1.44, ["holds", FAILS]), (1.31, 1.42, [FAILS, "holds"])]
)
def test_the_claim_is_judged_at_its_limits(time, peak, holds):
    found = detector.judge(outcome(time, peak))
    assert [claim.verdict for claim in found] == [*holds, FAILS, FAILS]
    assert not any(claim.promised for claim in found)
    assert "−" in found[0].figure and f"{time:.2f} times as fast" in found[1].figure


def test_what_was_not_measured_is_not_judged():
    assert detector.judge(Outcome()) == []
    missing = Outcome(sizes={("step", "tiny"): {}})
    assert [claim.verdict for claim in detector.judge(missing)] == ["not measured"] * 4


def test_the_command_measures_and_judges(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(options, "QUICK", Effort(seconds=0.0, least=1))
    out = tmp_path / "out"
    assert run.main(["--detector", "--quick", "--device", "cpu", "--check-claims", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    measured = {(row["case"], row["provider"], row["mode"], row["metric"]) for row in rows}
    metrics = ("time_ms", "peak_bytes", "error", "repeats")
    assert measured == {("tiny", name, "step", metric) for name in detector.PROVIDERS for metric in metrics}
    text = (out / "report.md").read_text()
    assert "speed +30 % expected" in text and "memory ÷ unfrozen" in text and "not measured" not in text
    assert "frozen branches" in capsys.readouterr().out


def test_cases_follow_the_device(monkeypatch):
    for device, arguments, expected in (
        ("cpu", [], ["small"]),
        ("cuda", [], ["documents"]),
        ("cpu", ["--quick"], ["tiny"]),
        ("cpu", ["--case", "documents", "tiny"], ["documents", "tiny"]),
    ):
        monkeypatch.setattr(options, "_device", lambda name, device=device: torch.device(device))
        request = options.resolve(options.parse(run.__doc__, ["--detector", *arguments]))
        assert request.plan.cases == expected and request.plan.baseline == "unfrozen"
    request = options.resolve(options.parse(run.__doc__, ["--detector", "unrouted", "frozen", "--quick"]))
    assert request.plan.providers == ("unrouted", "frozen") and request.plan.baseline == "unrouted"


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--detector --case documets", "no case 'documets'; did you mean 'documents'?"),
        ("--detector frozn", "no provider 'frozn'; did you mean 'frozen'?"),
        ("--detector --scope step", "--scope goes with --compare, not with --detector"),
        ("--detector --mode fwd", "--mode fwd: "),
        ("--detector --op bev_warp", "choose one of --compare, --detector, "),
        ("--detectr", "unknown option --detectr; did you mean '--detector'?"),
    ],
)
def test_a_mistake_gets_one_line_and_status_2(arguments, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments.split())
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not list(tmp_path.iterdir())

"""Statistics, correctness, claims, and reading results back. Nothing here depends on a clock."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rigfuse.bench import correctness, floors, measure, report, results
from rigfuse.bench.floors import Machine, traffic_floor
from rigfuse.bench.measure import Effort
from rigfuse.bench.results import Difference, Outcome, Skipped
from rigfuse.bench.subjects import compare
from rigfuse.bench.workload import MODES, Call
from rigfuse.train import claims

EPSILON = torch.finfo(torch.float32).eps


def row(provider, metric, samples, mode="fwd", case="documents", scope="temporal"):
    value = measure.summarise(samples).median
    return results.Row("compare", scope, case, provider, "cpu", "float32", mode, metric, value, list(samples))


def outcome(v2_time=1.0, v2_peak=50.0, difference=1e-7, keys=4200):
    rows = [
        row("v1", "time_ms", [1.4, 1.5, 1.6]),
        row("v2", "time_ms", [v2_time] * 3),
        row("v1", "peak_bytes", [100.0]),
        row("v2", "peak_bytes", [v2_peak]),
    ]
    found = Outcome(rows=rows, differences=[Difference("temporal", "documents", "v2", difference)])
    found.keys.update({("documents", "v1"): 8400, ("documents", "v2"): keys})
    return found


def verdicts(found):
    return [judged.verdict for judged in compare.judge(found, ["documents"], ["fwd"], EPSILON)]


def test_summary_and_paired_ratios():
    summary = measure.summarise([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (summary.median, summary.p20, summary.p80) == (3.5, 2.0, 5.0)
    # the machine became twice as slow in the middle; round by round the ratio is the same
    assert measure.paired_ratios([2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0]).tolist() == [2.0] * 4


@pytest.mark.parametrize("count", [5, 8, 25, 100])
def test_the_interval_holds_the_median_in_19_of_20_draws(count):
    """Of a distribution with a long tail, as times have."""
    draws = np.random.default_rng(0).lognormal(size=(4000, count))
    low, high = np.array([measure.median_interval(samples) for samples in draws]).T
    share = ((low <= 1) & (high >= 1)).mean()
    assert share > 0.93 and (count < 8 or share < 0.995)
    assert count > 5 or ((low == draws.min(1)) & (high == draws.max(1))).all()


def test_a_machine_that_changed_its_speed_is_seen_and_one_slow_round_of_many_is_not():
    quiet = np.random.default_rng(0).normal(10, 0.2, (3, 40)) * np.array([[1], [3], [7]])
    assert not measure.disturbed(quiet)
    step = np.where(np.arange(40) < 15, 5.0, 1.0)
    assert measure.disturbed(quiet * step) and measure.disturbed([[11.0, 2.2, 2.3], [9.0, 1.9, 1.8]])
    assert not measure.disturbed(quiet * np.where(np.arange(40) == 7, 5.0, 1.0))
    alone = quiet.copy()
    alone[1] *= step  # one provider that has two speeds
    assert not measure.disturbed(alone)
    assert not measure.disturbed([[1.0]]) and not measure.disturbed([])


def test_providers_take_turns():
    turns = []
    samplers = {name: lambda name=name: turns.append(name) or float(len(turns)) for name in "abc"}
    samples = measure.interleave(samplers, Effort(seconds=0, least=3, most=5))
    assert "".join(turns) == "abcbcacab"
    assert {name: len(values) for name, values in samples.items()} == dict(a=3, b=3, c=3)
    assert len(measure.interleave(samplers, Effort(seconds=60, least=2, most=4, enough=0.0))["a"]) == 4


@pytest.mark.parametrize("noise, least, most", [(0.01, 4, 4), (0.2, 8, 100), (50.0, 200, 200)])
def test_rounds_are_repeated_until_the_medians_are_known(noise, least, most):
    draw = np.random.default_rng(0)
    samplers = dict(quiet=lambda: 1.0, noisy=lambda: 1.0 + noise * draw.random())
    effort = Effort(seconds=60, least=4, most=200, enough=0.05)
    assert least <= len(measure.interleave(samplers, effort)["quiet"]) <= most


def test_a_wrong_gradient_is_an_error_even_with_a_right_output():
    weight = torch.ones(2, 2, requires_grad=True)
    right = correctness.compute(Call(lambda: weight * 3, dict(weight=weight), torch.ones(2, 2)), ("fwd", "fwd-bwd"))
    detached = Call(lambda: weight * 3 + 0 * weight.sum(), dict(weight=weight), torch.ones(2, 2))
    assert correctness.errors(correctness.compute(detached, ("fwd-bwd",)), right).worst == 0
    wrong = Call(lambda: weight.detach() * 3 + (weight - weight.detach()), dict(weight=weight), torch.ones(2, 2))
    error = correctness.errors(correctness.compute(wrong, ("fwd-bwd",)), right)
    assert error.outputs == dict(output=0) and error.grads["weight"] == pytest.approx(2 / 3)
    assert "gradient of weight" in error.excess(torch.float32, None)


def test_a_value_that_is_not_finite_and_another_shape_are_infinitely_wrong():
    one = torch.ones(2)
    assert correctness.relative_error(torch.tensor([1.0, float("nan")]), one) == float("inf")
    assert correctness.relative_error(torch.ones(3), one) == float("inf")
    assert correctness.relative_error(torch.zeros(2), torch.zeros(2)) == 0


def test_twice_the_plain_error_of_the_same_tensor_is_allowed_and_no_more_than_the_ceiling():
    def errors(output, weight):
        return correctness.Errors(dict(output=output), dict(weight=weight))

    plain = errors(1e-6, 1e-5)
    assert errors(2e-6, 2e-5).excess(torch.float32, plain) == ""
    assert "output" in errors(1e-5, 0).excess(torch.float32, plain)
    assert "gradient of weight" in errors(0, 3e-5).excess(torch.float32, plain)
    assert correctness.allowed(torch.float32, 1e-5) == pytest.approx(2e-5 + 8 * EPSILON)
    assert correctness.allowed(torch.float32, 1.0) == correctness.CEILING[torch.float32]


def test_a_gradient_that_jumps_is_held_to_the_ceiling_alone():
    def errors(offset, other=0.0):
        return correctness.Errors(dict(output=1e-7), dict(offset=offset, other=other), frozenset({"offset"}))

    plain = errors(1e-6, 1e-6)
    assert errors(9e-4).excess(torch.float32, plain) == "" and errors(9e-4).worst == 1e-7
    assert "gradient of offset" in errors(2e-3).excess(torch.float32, plain)
    assert "gradient of other" in errors(0.0, 1e-4).excess(torch.float32, plain)


def test_where_a_gradient_jumps_it_is_compared_apart_from_the_rest():
    """A wrong number elsewhere is wrong, though the gradient has such places."""
    places = torch.zeros(4, 50, dtype=torch.bool)
    places[0, 0] = True

    def result(change):
        offsets = torch.zeros(4, 50, requires_grad=True)  # no change of the output
        call = Call(
            lambda: (offsets * change).sum(), dict(offsets=offsets), torch.tensor(1.0), jumps_at=dict(offsets=places)
        )
        return correctness.compute(call, MODES)

    exact = result(torch.ones(4, 50))
    assert set(exact.grads) == {"offsets", "offsets where it jumps"} and exact.jumps == {"offsets where it jumps"}
    plain = correctness.errors(result(torch.ones(4, 50) + 1e-7), exact)
    for place, said in (((0, 0), ""), ((0, 1), "gradient of offsets, allowed")):
        change = torch.ones(4, 50)
        change[place] += 9e-4
        assert said in (wrong := correctness.errors(result(change), exact).excess(torch.float32, plain))
        assert bool(wrong) == bool(said)


def test_no_gradient_errs_more_than_the_worst_of_plain_pytorch():
    def errors(first, second):
        return correctness.Errors(dict(output=1e-7), dict(first=first, second=second))

    plain = errors(1e-6, 1e-5)
    assert errors(9e-6, 1e-5).excess(torch.float32, plain) == ""
    assert "gradient of first" in errors(2e-5, 1e-5).excess(torch.float32, plain)


HOLDS, FAILS, UNSURE, ABSENT = claims.HOLDS, claims.FAILS, claims.UNSURE, claims.ABSENT


def test_claims_hold():
    assert verdicts(outcome()) == [HOLDS] * 4


@pytest.mark.parametrize(
    "change, place",
    [(dict(keys=8400), 0), (dict(v2_peak=51.0), 1), (dict(v2_time=1.2), 2), (dict(difference=1e-3), 3)],
    ids=["keys", "memory", "speed", "equality"],
)
def test_each_claim_can_fail(change, place):
    assert verdicts(outcome(**change)) == [FAILS if number == place else HOLDS for number in range(4)]


@pytest.mark.parametrize(
    "v1, v2, verdict, why",
    [
        ([1.5] * 9, [1.0] * 9, HOLDS, ""),
        ([1.3] * 9, [1.0] * 9, FAILS, ""),
        ([1.3, 1.5] * 5, [1.0] * 10, UNSURE, "spread too wide"),  # on both sides of the limit
        ([0.19, *[0.5] * 9, 4.76] * 4, [1.0] * 44, FAILS, ""),  # a few that lie elsewhere
        ([0.2, 0.4, 1.1, 4.8] * 9, [1.0] * 36, UNSURE, "spread too wide"),  # all over the place
        ([15.0] * 4 + [3.0] * 4, [5.0] * 4 + [1.0] * 4, UNSURE, "the machine changed its speed"),
    ],
)
def test_a_speed_is_judged_only_where_it_is_known(v1, v2, verdict, why):
    found = outcome()
    found.rows[:2] = [row("v1", "time_ms", v1), row("v2", "time_ms", v2)]
    speed = compare.judge(found, ["documents"], ["fwd"], EPSILON)[2]
    assert speed.verdict == verdict and why in speed.figure


def test_a_ratio_is_judged_by_both_its_ends():
    speed, memory = (claims.Claim("", 1.4, at_least=at_least) for at_least in (True, False))
    ends = [(1.5, 1.6), (1.2, 1.3), (1.3, 1.5), (1.4, None), (float("nan"), 2.0)]
    assert [speed.verdict(*pair) for pair in ends] == [HOLDS, FAILS, UNSURE, HOLDS, UNSURE]
    assert [memory.verdict(*pair) for pair in ends] == [FAILS, HOLDS, UNSURE, HOLDS, UNSURE]


@pytest.mark.parametrize("v2_time, v2_peak, verdict", [(1.0, 60.0, HOLDS), (1.4, 80.0, FAILS)])
def test_what_the_documents_expect_of_a_training_step(v2_time, v2_peak, verdict):
    found = outcome()
    assert all(judged.promised for judged in compare.judge(found, ["documents"], ["fwd", "step"], EPSILON))
    found.sizes["step", "tiny"] = {}
    place = dict(mode="step", case="tiny", scope="step")
    found.rows += [row("v1", "time_ms", [1.5], **place), row("v2", "time_ms", [v2_time], **place)]
    found.rows += [row("v1", "peak_bytes", [100.0], **place), row("v2", "peak_bytes", [v2_peak], **place)]
    judged = compare.judge(found, ["documents"], ["fwd", "step"], EPSILON)
    assert [claim.verdict for claim in judged if not claim.promised] == [verdict] * 2
    assert [claim.verdict for claim in judged if claim.promised] == [HOLDS] * 4


def test_a_wrong_result_refutes_equality_and_what_is_absent_is_not_measured():
    found = outcome()
    found.skipped.append(Skipped("temporal", "documents", "v2", "wrong result", wrong=True))
    found.rows = [entry for entry in found.rows if entry.provider != "v2"]
    assert verdicts(found) == [HOLDS, ABSENT, ABSENT, FAILS]


def test_results_survive_writing_and_every_row_has_the_facts(tmp_path):
    rows = outcome().rows
    rows.append(replace(rows[0], metric="error", value=float("inf"), samples=[float("inf")]))  # as a wrong result has
    facts = dict(commit="abc", dirty=False, hardware=dict(cpu="x"), versions=dict(torch="2"), clocks={})
    with open(tmp_path / "results.jsonl", "w") as file:
        for entry in rows:
            results.append(file, entry, facts)
    assert results.read(tmp_path) == (rows, facts)
    keys = "subject scope case provider device dtype mode metric value samples commit dirty hardware versions clocks"
    keys = keys.split()
    assert all(list(json.loads(line)) == keys for line in (tmp_path / "results.jsonl").read_text().splitlines())


@pytest.mark.parametrize("text", ["", "not json\n", '{"subject": "compare"}\n', "[1]\n"])
def test_a_file_that_is_no_result_is_refused(tmp_path, text):
    (tmp_path / "results.jsonl").write_text(text)
    with pytest.raises(results.ResultsError, match="results.jsonl"):
        results.read(tmp_path)


def test_against_an_earlier_run_only_changes_beyond_the_spread_count():
    then = [row("v2", "time_ms", samples) for samples in ([10, 11, 12],)]
    for samples, verdict in (([20, 21, 22], "worse"), ([5, 6, 7], "better"), ([11, 12, 13], "same")):
        table = report.against_table([row("v2", "time_ms", samples)], then, "then")
        assert table.rows[0][-1] == verdict
    step = [replace(then[0], samples=[10.0, 10.0, 50.0, 50.0], value=30.0)]
    assert report.against_table(step, then, "then").rows[0][-1] == UNSURE  # the machine changed its speed
    elsewhere = replace(then[0], device="cuda")
    assert report.against_table([elsewhere], then, "then").rows == []


def test_the_floor_is_the_longer_of_traffic_and_arithmetic():
    x = torch.ones(1000)
    floor = traffic_floor([x, x], [x], [x, x], flops=6000)
    assert floor.bytes == {"fwd": 12_000, "fwd-bwd": 12_000 + 20_000}
    assert Machine(12e6, 1e12).floor_ms(floor, "fwd") == 1
    assert Machine(1e12, 6e6).floor_ms(floor, "fwd-bwd") == 3


def test_results_repeat_only_bit_for_bit():
    once = correctness.Result([torch.ones(3)], dict(weight=torch.ones(2)))
    other_grad = correctness.Result([torch.ones(3)], dict(weight=torch.tensor([1, 1 + 1e-6])))
    other_output = correctness.Result([torch.ones(3) * (1 + 1e-6)], dict(weight=torch.ones(2)))
    assert correctness.repeats(once, once, "fwd") and correctness.repeats(once, once, "fwd-bwd")
    assert correctness.repeats(once, other_grad, "fwd") and not correctness.repeats(once, other_grad, "fwd-bwd")
    assert not correctness.repeats(once, other_output, "fwd")


def test_the_machine_is_measured_on_data_and_not_on_ones(monkeypatch):
    operands = []
    monkeypatch.setattr(floors, "_best_seconds", lambda function, device: operands.append(function.__closure__) or 1.0)
    floors.measure_machine(torch.device("cpu"), torch.float32)
    tensors = [cell.cell_contents for closure in operands for cell in closure]
    random = [tensor for tensor in tensors if len(tensor.flatten()[:1000].unique()) > 100]
    assert len(tensors) == 4 and len(random) >= 3  # all but the copy's target

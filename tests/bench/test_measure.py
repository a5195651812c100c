"""Statistics, correctness, claims, and reading results back. Nothing here depends on a clock."""

import json
from dataclasses import replace

import pytest
import torch

from rigfuse.bench import claims, correctness, measure, report, results
from rigfuse.bench.floors import Machine, traffic_floor
from rigfuse.bench.runner import Difference, Outcome, Skipped
from rigfuse.bench.workload import Call

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
    return [claim.holds for claim in claims.judge(found, ["documents"], ["fwd"], EPSILON)]


def test_summary_and_paired_ratios():
    summary = measure.summarise([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    assert (summary.median, summary.p20, summary.p80) == (3.5, 2.0, 5.0)
    # the machine became twice as slow in the middle; round by round the ratio is the same
    ratio = measure.paired_ratio([2.0, 2.0, 4.0, 4.0], [1.0, 1.0, 2.0, 2.0])
    assert (ratio.median, ratio.p20, ratio.p80) == (2.0, 2.0, 2.0)


def test_providers_take_turns():
    turns = []
    samplers = {name: lambda name=name: turns.append(name) or float(len(turns)) for name in "abc"}
    samples = measure.interleave(samplers, seconds=0, least=3, most=5)
    assert "".join(turns) == "abcbcacab"
    assert {name: len(values) for name, values in samples.items()} == dict(a=3, b=3, c=3)
    assert len(measure.interleave(samplers, seconds=60, least=1, most=2)["a"]) == 2


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


def test_claims_hold():
    assert verdicts(outcome()) == [True] * 4


@pytest.mark.parametrize(
    "change, place",
    [(dict(keys=8400), 0), (dict(v2_peak=51.0), 1), (dict(v2_time=1.1), 2), (dict(difference=1e-3), 3)],
    ids=["keys", "memory", "speed", "equality"],
)
def test_each_claim_can_fail(change, place):
    assert verdicts(outcome(**change)) == [number != place for number in range(4)]


@pytest.mark.parametrize("v2_time, v2_peak, holds", [(1.0, 60.0, [True, True]), (1.4, 80.0, [False, False])])
def test_what_the_documents_expect_of_a_training_step(v2_time, v2_peak, holds):
    found = outcome()
    assert not any(claim.expected for claim in claims.judge(found, ["documents"], ["fwd", "step"], EPSILON))
    found.sizes["step", "tiny"] = {}
    place = dict(mode="step", case="tiny", scope="step")
    found.rows += [row("v1", "time_ms", [1.5], **place), row("v2", "time_ms", [v2_time], **place)]
    found.rows += [row("v1", "peak_bytes", [100.0], **place), row("v2", "peak_bytes", [v2_peak], **place)]
    judged = claims.judge(found, ["documents"], ["fwd", "step"], EPSILON)
    assert [claim.holds for claim in judged if claim.expected] == holds
    assert [claim.holds for claim in judged if not claim.expected] == [True] * 4


def test_a_wrong_result_refutes_equality_and_what_is_absent_is_not_measured():
    found = outcome()
    found.skipped.append(Skipped("temporal", "documents", "v2", "wrong result", wrong=True))
    found.rows = [entry for entry in found.rows if entry.provider != "v2"]
    assert verdicts(found) == [True, None, None, False]


def test_results_survive_writing_and_every_row_has_the_facts(tmp_path):
    rows = outcome().rows
    facts = dict(commit="abc", hardware=dict(cpu="x"), versions=dict(torch="2"), clocks={})
    results.write(tmp_path / "results.jsonl", rows, facts)
    assert results.read(tmp_path) == (rows, facts)
    keys = "subject scope case provider device dtype mode metric value samples commit hardware versions clocks".split()
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

"""Map detection as an experiment: it trains, resumes bit for bit, its figures are those of known lines, its tools."""

import json

import pytest
import torch

from rigfuse.modules.map_qformer.decoder import MapOutput
from rigfuse.train import checkpoint
from rigfuse.train import main as program
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.map_qformer import first_step, memory
from rigfuse.train.systems.map_qformer.data import MapSamples
from rigfuse.train.tools import check_setup, compare_maps, generate_gt_cache

TINY = "map_qformer_stage2_tiny"
SMALL = (
    "data.image_size=36,64", "model.images.channels=16", "model.qformer.width=32", "model.qformer.heads=2",
    "model.qformer.layers=2", "model.qformer.hidden=32", "model.qformer.grid=1,2", "model.lm.width=32",
    "model.lm.layers=2", "model.lm.hidden=32", "model.instances=6", "model.points=5", "model.decoder.reduce=32,",
    "loader.batch_size=1", "run.log_steps=1", "run.tensorboard=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("maps")


@pytest.fixture
def settings(small_world, folder):
    made = apply_options(experiment(TINY), SMALL)
    made.data.root, made.data.cache = str(small_world), str(folder / "cache")
    check(made)
    return made


def test_the_cache_is_made_beforehand(small_world, folder, capsys):
    """Once: what training then looks for is there."""
    options = ["--config", TINY, "--data", str(small_world), "--cfg-options", f"data.cache={folder / 'cache'}"]
    anchors = folder / "anchors.json"
    assert generate_gt_cache.main([*options[:4], "--anchors", str(anchors), *options[4:]]) == 0
    made = sorted(path.name for path in (folder / "cache").iterdir())
    assert [name.rpartition(".")[2] for name in made] == ["json", "npz"] * 2
    assert "world_train" in capsys.readouterr().out
    settings = apply_options(experiment(TINY), [*SMALL, f"data.cache={folder / 'cache'}"])
    settings.data.root = str(small_world)
    settings.anchors = str(anchors)
    with pytest.raises(ValueError, match=r"anchors have shape \(20, 10, 2\), need \(6, 5, 2\) finite numbers"):
        settings.build_model()
    settings.build_data()
    assert sorted(path.name for path in (folder / "cache").iterdir()) == made
    with pytest.raises(SystemExit):
        generate_gt_cache.main([*options[:4], "--split", "world_vall", *options[4:]])
    assert "no split 'world_vall'; did you mean 'world_val'?" in capsys.readouterr().err


def test_who_knows_the_lines_is_perfect(settings):
    """So frame, classes and points of what is found are those of the truth."""
    _, validation = settings.build_data()

    class Knows:
        def find(self, batch):
            lines, labels = batch.truth.lines[0][:, 0], batch.truth.labels[0]
            logits = torch.where(labels[:, None] == torch.arange(3), 9.0, -9.0)
            return MapOutput(logits[None, None], lines[None, None])

    batches = [settings.collate([validation[0, index]]).to("cpu") for index in range(3)]
    figures = settings.evaluate(Knows(), batches)
    assert figures["mAP"] == figures["hard/mAP"] == 1 and figures["AP/boundary@0.5"] == 1
    assert sum(len(batch.truth.labels[0]) for batch in batches) > 6


def test_train_resume_and_evaluate_from_the_command_line(small_world, folder, capsys):
    options = [*SMALL, f"data.cache={folder / 'cache'}", "run.epochs=2", "run.evaluate_epochs=2"]
    options += ["run.checkpoint_steps=1", "run.keep=50", "dropout.p_missing=0.5"]
    common = ["--config", TINY, "--data", str(small_world)]
    program.main([*common, "--work-dir", str(folder / "whole"), "--cfg-options", *options])
    said = capsys.readouterr().out
    assert "LR: q=" in said and "language model random:" in said
    steps = checkpoint.checkpoints(folder / "whole" / "checkpoints")[::-1]
    records = [json.loads(line) for line in (folder / "whole" / "log.jsonl").read_text().splitlines()]
    trained, evaluated = [line for line in records if "loss" in line], records[-1]
    assert len(trained) == len(steps) == 6 and all(line["skipped"] == 0 for line in trained)
    assert {f"losses/{name}" for name in ("cls", "points", "direction")} <= trained[0].keys()
    state = checkpoint.load(steps[-1])["model"]
    assert not any("layers" in name for name in state if name.startswith("language"))  # the frozen model is not in it

    program.main([*common, "--work-dir", str(folder / "part"), "--resume", str(steps[2]), "--cfg-options", *options])
    whole, part = (checkpoint.load(folder / run / "checkpoints" / "last.pt") for run in ("whole", "part"))
    assert all(torch.equal(part["model"][name], value) for name, value in whole["model"].items())
    capsys.readouterr()
    program.main(["--eval-only", str(steps[-1])])
    figures = json.loads(capsys.readouterr().out)
    assert {f"val/{name}": value for name, value in figures.items()} == pytest.approx(
        {name: value for name, value in evaluated.items() if name.startswith("val/")}, abs=1e-6
    )
    compared = ["--pictures", "1", "--lines", "0", "--out", str(folder / "compared")]
    assert compare_maps.main([str(folder / "whole"), *compared]) == 0
    found = json.loads((folder / "compared" / "figures.json").read_text())
    assert list(found) == ["mean map", "untrained", "whole"] and found["whole"] == pytest.approx(figures, abs=1e-6)
    assert (folder / "compared" / "000.png").stat().st_size > 10_000
    with pytest.raises(SystemExit, match="^error: .*trained with another language model than lm.source gives$"):
        program.main(["--eval-only", str(steps[-1]), "--cfg-options", "model.lm.seed=1"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["model.lm.source=/nowhere/vicuna"], "error: lm.source is /nowhere/vicuna: no such folder"),
        (["model.qformer.weights=/nowhere.pt"], "error: qformer.weights: /nowhere.pt cannot be read as tensors"),
        (["model.lm.heads=5"], "error: model.lm.heads is 5, needs a divisor of 32"),
        (["metric=mAp"], "error: metric is 'mAp'; did you mean 'mAP'?"),
    ],
)
def test_mistakes_are_told_in_one_line(small_world, folder, options, message):
    options = [*SMALL, f"data.cache={folder / 'cache'}", *options]
    with pytest.raises(SystemExit) as stopped:
        arguments = ["--data", str(small_world), "--work-dir", str(folder / "bad"), "--cfg-options", *options]
        program.main(["--config", TINY, *arguments])
    assert str(stopped.value.code).startswith(message) and "\n" not in stopped.value.code


def test_a_world_is_asked_for(tmp_path):
    with pytest.raises(SystemExit, match="data.root is empty, maps need a folder in nuScenes format"):
        program.main(["--config", TINY, "--work-dir", str(tmp_path / "run")])


def test_the_set_up_is_checked(settings, capsys, monkeypatch):
    """Gradients in all trained parts, none in the language model; a part without one is told."""
    assert check_setup.main(["--config", TINY, "--cfg-options", *SMALL]) == 0
    out = capsys.readouterr().out
    assert "Parameter groups" in out and "the language model's sha256 is the same after the step" in out
    torch.manual_seed(0)
    model = settings.build_model()
    model.queries.forward = lambda: torch.zeros(36, 32)
    monkeypatch.setattr(type(settings), "build_model", lambda self: model)
    report = first_step.one_step(settings, first_step.made_up_batch(settings), torch.device("cpu"))
    assert report.problems() == ["queries: no gradient"]
    model.language.model.norm.weight.data += 1
    report = first_step.one_step(settings, first_step.made_up_batch(settings), torch.device("cpu"))
    assert "the frozen language model moved: its sha256 is another" in report.problems()


def test_every_rank_evaluates_as_many_samples():
    """Or a sharded model would wait for ever; together they see all."""
    shares = [MapSamples.share(range(5), rank, 3) for rank in range(3)]
    assert {len(share) for share in shares} == {2} and {index for share in shares for index in share} == set(range(5))


def test_the_memory_of_a_step_follows_from_sizes():
    """Of the full size, from its settings alone: mostly the frozen weights, and recomputing is what makes it fit."""
    made = experiment("map_qformer_stage2")
    model = first_step.on_meta(made)
    parts = first_step.parts_of(model)
    found = memory.memory_of_step(made, model, parts)
    made.model.lm.checkpoint = False
    stored = memory.memory_of_step(made, model, parts)
    assert found["frozen weights"] == pytest.approx(12.3, abs=0.1)
    assert stored["together"] - found["together"] == pytest.approx(25.7 - 2.6, abs=1.0)

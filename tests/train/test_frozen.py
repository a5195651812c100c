"""What is frozen is proven not to have moved, by one bit; on a toy that has everything that freezes."""

import json
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from rigfuse.train import checkpoint, frozen
from rigfuse.train import systems as configs
from rigfuse.train.config import apply_options, to_dict
from rigfuse.train.distributed import World
from rigfuse.train.tools import verify_frozen
from rigfuse.train.trainer import Trainer
from support.toy_experiment import Output, ToyData, ToyExperiment, ToyModel

SIZE = "voxel0100_r50_800x320_cbgs"
FROZEN = {
    *(f"backbone.0.{name}" for name in ("weight", "bias")),
    *(f"backbone.1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
    *(f"neck.norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")),
    "constant",
}


class Neck(nn.Module):
    """Trains, but keeps its statistics."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.norm(x)

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.neck = Neck()
        self.head = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.register_buffer("constant", torch.tensor(2.0))

    def predict(self, batch):
        return self.constant * self.head(self.neck(self.backbone(batch.x)))

    def forward(self, batch):
        return Output(dict(main=(self.predict(batch) - batch.y).square().mean()))


@dataclass
class Experiment(ToyExperiment):
    model: ToyModel = field(default_factory=ToyModel)
    data: ToyData = field(default_factory=ToyData)

    def build_model(self):
        return Network()


def make():
    experiment = Experiment(losses=dict(main=1.0))
    experiment.optim.multipliers, experiment.optim.lr = {"backbone": 0.0}, 0.05
    experiment.loader.batch_size, experiment.loader.workers = 4, 0
    experiment.run.epochs, experiment.run.log_steps, experiment.run.tensorboard = 3, 100, False
    return experiment


@pytest.fixture
def toy(monkeypatch):
    monkeypatch.setitem(configs.EXPERIMENTS, "toy", make)


@pytest.fixture
def run(toy, tmp_path):
    Trainer(configs.experiment("toy"), tmp_path / "run", World()).fit()
    return tmp_path / "run"


def tamper(run, change):
    """A new last checkpoint, whose weights `change` was let at."""
    last = checkpoint.checkpoints(run / "checkpoints")[0]
    state = checkpoint.load(last)
    change(state["model"])
    state["counters"]["step"] += 1
    checkpoint.save(last.parent, state["counters"]["step"], state, keep=9)


def verify(capsys, *arguments):
    status = verify_frozen.main([str(argument) for argument in arguments])
    return status, capsys.readouterr()


def test_a_run_that_froze_what_it_should_passes(run, capsys, tmp_path):
    first, *_, last = checkpoint.checkpoints(run / "checkpoints")[::-1]
    for arguments in ([run], [last, first], [first], [run, "initial"]):
        status, printed = verify(capsys, *arguments, "--json", tmp_path / "found.json")
        assert status == 0 and f"{len(FROZEN)} frozen tensors did not move" in printed.out
        found = json.loads((tmp_path / "found.json").read_text())
        assert found["holds"] and not found["warnings"]
        assert {tensor["name"] for tensor in found["tensors"] if tensor["frozen"]} == FROZEN
        assert all(tensor["moved"] != tensor["frozen"] for tensor in found["tensors"])
    assert found["earlier"]["step"] == -1 and found["later"]["step"] == 18


def test_parts_are_counted(run, capsys):
    lines = verify(capsys, run)[1].out.splitlines()
    rows = {cells[0]: cells[1:] for line in lines if len(cells := [c.strip() for c in line.strip("│ ").split("│")]) > 7}
    assert rows["backbone"] == ["7", "28", "100%", "7", "0", "0", "0"]
    assert rows["neck"] == ["5", "8", "0%", "3", "0", "2", "2"]
    assert rows["constant"] == ["1", "0", "—", "1", "0", "0", "0"]
    assert rows["all"] == ["20", "49", "57%", "11", "0", "9", "9"]


@pytest.mark.parametrize("name", sorted(FROZEN))
def test_one_bit_of_anything_frozen_is_found(name, run, capsys):
    def flip(weights):
        tensor = weights[name].reshape(-1)
        tensor.view(torch.int64 if tensor.dtype == torch.int64 else torch.int32)[-1] ^= 1

    tamper(run, flip)
    status, printed = verify(capsys, run)
    found = [line for line in printed.out.splitlines() if line.startswith("FROZEN BUT MOVED: ")]
    assert status == 1 and len(found) == 1 and f" {name}, by up to " in found[0]
    assert "did not move" not in printed.out


def test_even_the_sign_of_a_zero_is_found(run, capsys):
    tamper(run, lambda weights: weights["backbone.1.bias"].neg_())
    status, printed = verify(capsys, run)
    assert status == 1 and "FROZEN BUT MOVED: backbone.1.bias, by up to 0\n" in printed.out


def test_training_mode_by_mistake_is_found(toy, tmp_path, capsys, monkeypatch):
    """The fault that this is for: nothing frozen learns, but its statistics follow the batches."""
    monkeypatch.setattr("rigfuse.train.trainer.set_training", lambda model: model.train())
    Trainer(configs.experiment("toy"), tmp_path / "run", World()).fit()
    status, printed = verify(capsys, tmp_path / "run")
    moved = {line.split()[3].rstrip(",") for line in printed.out.splitlines() if line.startswith("FROZEN BUT MOVED")}
    assert status == 1
    assert moved == {f"backbone.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


def test_what_trains_and_stays_is_a_warning(run, capsys):
    first = checkpoint.load(checkpoint.checkpoints(run / "checkpoints")[-1])["model"]
    tamper(run, lambda weights: weights.update({name: first[name] for name in ("head.1.bias", "head.0.running_var")}))
    status, printed = verify(capsys, run)
    assert status == 0
    assert "trained but did not move: head.1.bias\n" in printed.out
    assert "trained but did not move: head.0.running_var\n" in printed.out


def test_where_nothing_was_trained_nothing_is_proven(run, capsys):
    tamper(run, lambda weights: None)
    newest, before = checkpoint.checkpoints(run / "checkpoints")[:2]
    status, printed = verify(capsys, newest, before)
    assert status == 1 and "NOTHING WAS TRAINED" in printed.out


def test_a_run_with_one_checkpoint_is_held_against_its_beginning(toy, tmp_path, capsys):
    experiment = apply_options(configs.experiment("toy"), ["run.epochs=1", "run.seed=7"])
    trainer = Trainer(experiment, tmp_path / "run", World())
    beginning = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.fit()
    status, printed = verify(capsys, tmp_path / "run")
    assert status == 0 and "(step 6) against the initial weights of seed 7" in printed.out
    again = frozen.initial(trainer.state_dict()["config"], None)
    assert all(torch.equal(tensor, again.weights[name]) for name, tensor in beginning.items())


def test_weights_of_another_run_belong_to_the_beginning(run, tmp_path, capsys):
    given = run / "checkpoints" / "last.pt"
    Trainer(apply_options(configs.experiment("toy"), ["run.seed=7"]), tmp_path / "next", World(), weights=given).fit()
    status, printed = verify(capsys, tmp_path / "next", "initial", "--weights", given)
    assert status == 0 and f"seed 7, begun with {given}" in printed.out
    status, printed = verify(capsys, tmp_path / "next", "initial")
    assert status == 1 and "this --weights or none" in printed.out
    status, printed = verify(capsys, tmp_path / "next", "--weights", given)
    assert status == 1 and "goes with EARLIER initial" in printed.err


def test_the_beginning_of_a_real_run_is_made_again(tmp_path):
    options = ["data.scenes=1,1", "data.image_size=48,80", "loader.batch_size=8", "run.seed=3"]
    trainer = Trainer(apply_options(configs.experiment("completion_v2_tiny"), options), tmp_path, World())
    again = frozen.initial(trainer.state_dict()["config"], None)
    hashes = {name: frozen.sha256(tensor) for name, tensor in trainer.model.state_dict().items()}
    assert hashes == {name: frozen.sha256(tensor) for name, tensor in again.weights.items()}


def test_a_hash_is_of_values_and_dtype_not_of_the_memory_format():
    x = torch.randn(2, 3, 4, 5)
    assert frozen.sha256(x) == frozen.sha256(x.contiguous(memory_format=torch.channels_last))
    assert frozen.sha256(x) != frozen.sha256(x.to(torch.bfloat16))
    assert frozen.sha256(torch.tensor(0.0)) != frozen.sha256(torch.tensor(-0.0))
    assert frozen.sha256(torch.empty(0)) == frozen.sha256(torch.empty(0, 3))


@pytest.mark.parametrize("name", ["cmt_aqr", "cmt_aqr_unfrozen", "cmt_aqr_fixed"])
def test_what_the_detector_freezes(name):
    settings = configs.experiment(f"{name}_{SIZE}")
    with torch.device("meta"):
        model = settings.build_model()
    found, everything = frozen.frozen_names(model, settings), set(model.state_dict())
    branches = ("img_backbone.", "pts_backbone.", "pts_voxel_encoder.", "pts_middle_encoder.")
    expected = {each for each in everything if each.startswith(branches)}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    expected |= {each for each in everything if each.startswith("pts_neck.") and each.endswith(statistics)}
    if name == "cmt_aqr_fixed":
        expected.add("attention_bias_generator.bias_scale")
    assert found == (set() if name == "cmt_aqr_unfrozen" else expected)


def test_mistakes_are_one_line(run, capsys, tmp_path):
    first, *_, last = checkpoint.checkpoints(run / "checkpoints")[::-1]
    state = checkpoint.load(last)
    strange = dict(state, model={**state["model"], "extra": torch.zeros(1)}, counters=dict(step=1))
    other = checkpoint.save(tmp_path / "other", 1, strange, keep=1)
    for arguments, said in (
        ([first, last], "EARLIER: "),
        ([tmp_path], "it has no checkpoints"),
        ([last, tmp_path / "gone.pt"], "gone.pt does not exist"),
        ([last, other], "does not fit the model: it has extra, the model does not"),
    ):
        status, printed = verify(capsys, *arguments)
        assert status == 1 and said in printed.err and printed.err.count("\n") == 1
    with pytest.raises(SystemExit, match="2"):
        verify_frozen.main([str(run), "--jsn", "x"])
    assert "did you mean '--json'?" in capsys.readouterr().err


def test_files_of_weights_may_be_gone(tmp_path):
    settings = configs.experiment(f"cmt_aqr_{SIZE}_tiny")
    weights = settings.build_model().state_dict()
    settings.model.camera.weights = str(tmp_path / "gone")
    trained = weights | {"reference_points": weights["reference_points"] + 0.5}
    states = [frozen.State("x", step, each, to_dict(settings)) for step, each in enumerate((weights, trained))]
    moved = {finding.name: finding.change for finding in frozen.compare(*states) if finding.moved}
    assert moved == {"reference_points": pytest.approx(0.5)}

"""One of two gloo ranks dies without a word, as for lack of memory: the other ends too, and the run can be resumed."""

import torch

from rigfuse.train import checkpoint
from support.ranks import train_toy_on_ranks


def test_a_killed_rank_ends_the_run_and_the_resumed_one_ends_as_if_undisturbed(tmp_path):
    def train(name, *options):
        logs = tmp_path / f"logs-{len(list(tmp_path.iterdir()))}"
        every = ("--config", "toy", "--work-dir", str(tmp_path / name), "--resume", "auto")
        return train_toy_on_ranks(2, logs, *every, "--cfg-options", "run.checkpoint_steps=2", *options)

    def last(name):
        return checkpoint.load(tmp_path / name / "checkpoints" / "last.pt")

    assert [status for status, _ in train("whole")] == [0, 0]

    survivor, killed = train("killed", "model.fault=sigkill@1:9")
    assert killed[0] == -9 and survivor[0] == 1
    line = survivor[1].splitlines()[-1]
    assert "error: rank 0 lost another rank in the step after 9; --resume auto continues" in line
    assert "Traceback" not in survivor[1]
    assert last("killed")["counters"]["step"] == 8

    (status, output), (other, _) = train("killed")
    assert (status, other) == (0, 0) and "step-00000008.pt at step 8" in output
    whole, resumed = last("whole"), last("killed")
    assert whole["counters"] == resumed["counters"] and whole["counters"]["step"] == 12
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    for state, other in zip(whole["optimizer"].values(), resumed["optimizer"].values(), strict=True):
        assert all(torch.equal(state[name], other[name]) for name in state)

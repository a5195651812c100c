"""Trains an experiment, or evaluates a checkpoint.

begin with the tiny ones: they need no data and no GPU
  python train/main.py --config completion_v2_tiny
on several GPUs, going on where an earlier start was stopped
  torchrun --nproc-per-node 8 train/main.py --config completion_v2 --data /data/nuscenes --resume auto
look at the settings, and change some (every name is in --print-config)
  python train/main.py --config completion_v2 --print-config
  python train/main.py --config completion_v2 --cfg-options run.epochs=8 optim.lr=1e-4 losses.ssl=2
evaluate, and compare runs
  python train/main.py --eval-only work_dirs/completion_v2_tiny/checkpoints/best.pt
  tensorboard --logdir work_dirs

A run's folder gets config.json (all settings), log.jsonl (a JSON line a record), checkpoints/ (last.pt, best.pt, the
newest few) and, at the end, result.json. A resumed run may have other settings, ranks or batches: what changed is
applied and told, and what cannot be changed is refused.
"""

import argparse
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from rigfuse.train import checkpoint
from rigfuse.train.command_line import Parser, patience
from rigfuse.train.config import Experiment, apply_options, check, diff, dumps, to_dict, update
from rigfuse.train.distributed import FirstRankError, World, is_lost_rank, on_first_rank, wait_for_all, world
from rigfuse.train.lock import claimed
from rigfuse.train.systems import EXPERIMENTS, experiment
from rigfuse.train.trainer import Trainer, TrainingError

_BEFORE = (ValueError, TypeError, OSError, ImportError, checkpoint.CheckpointError, FirstRankError)
_DURING = (OSError, checkpoint.CheckpointError, FirstRankError, TrainingError)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument_group("what to do").add_argument
    add("--config", metavar="NAME", help="the experiment to train; --list shows them")
    add("--eval-only", metavar="CKPT", help="evaluate a checkpoint, with the settings it was trained with")
    add("--list", action="store_true", help="print the names of the experiments and end")
    add("--print-config", action="store_true", help="print the settings as JSON and end")
    add("--diff-config", metavar=("A", "B"), nargs=2, help="print the settings in which two experiments differ and end")
    add = parser.add_argument_group("with what").add_argument
    add("--data", metavar="ROOT", help="a folder in nuScenes format; default: the built-in drive, where there is one")
    add("--work-dir", metavar="FOLDER", help="where the run goes; default work_dirs/NAME")
    add("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], help="settings to change, like run.epochs=2")
    add("--resume", metavar="CKPT", nargs="?", const="auto", help="go on from a checkpoint; auto: from last.pt, if any")
    add("--weights", metavar="CKPT", help="begin with the weights of another run, where names and shapes agree")
    add("--deterministic", action="store_true", help="two runs give bitwise equal weights")
    add("--profile", action="store_true", help="for nsys --capture-range=cudaProfilerApi: record run.profile_steps")
    chosen = parser.parse_args(arguments)
    if not (chosen.config or chosen.diff_config or chosen.eval_only or chosen.list):
        parser.error("needs --config NAME (--list shows them, --help the rest)")
    if chosen.resume and chosen.eval_only:
        parser.error("--resume trains on, --eval-only does not train; choose one")
    return chosen


def configure(chosen: argparse.Namespace) -> tuple[Experiment, dict | None]:
    """The settings, checked, and the checkpoint to evaluate if there is one."""
    state = checkpoint.load(chosen.eval_only) if chosen.eval_only else None
    settings = experiment(chosen.config or state["config"]["name"])
    if state is not None and not chosen.config:
        update(settings, state["config"])
    if chosen.data:
        settings.data.root = chosen.data
    if chosen.deterministic:
        settings.run.deterministic = True
    apply_options(settings, chosen.cfg_options)
    check(settings)
    return settings, state


def resume_from(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to continue from. A folder with checkpoints is never trained over by accident."""
    checkpoints = folder / "checkpoints"
    existing = checkpoint.newest(checkpoints)
    if resume == "auto":
        return existing
    if existing and (resume is None or Path(resume).resolve().parent != checkpoints.resolve()):
        raise ValueError(f"{folder} holds a run already; --resume auto continues it, --work-dir takes another")
    return None if resume is None else Path(resume)


def train(settings: Experiment, folder: Path, here: World, chosen: argparse.Namespace) -> None:
    with ExitStack() as held:
        with _errors_in_one_line(_BEFORE):
            on_first_rank(lambda: held.enter_context(claimed(folder)))
            resume = resume_from(chosen.resume, folder)
            wait_for_all()  # no rank writes before all have looked
            with patience(f"{settings.name}: reading the data, building the model", here.is_main):
                trainer = Trainer(settings, folder, here, resume, profile=chosen.profile, weights=chosen.weights)
        if here.is_main:
            print(
                f"{dumps(settings)}\n{settings.name}: {trainer.total} steps, {here.size} rank(s), {folder}", flush=True
            )
        try:
            with _errors_in_one_line(_DURING):
                trainer.fit()
        except RuntimeError as error:
            if here.size == 1 or not is_lost_rank(error):
                raise
            where = f"rank {here.rank} lost another rank in the step after {trainer.progress.step}"
            sys.exit(f"error: {where}; --resume auto continues from the last checkpoint ({_first_line(error)})")


def evaluate(settings: Experiment, folder: Path, here: World, state: dict, source: str) -> None:
    with patience(f"evaluating {source}", here.is_main):
        with _errors_in_one_line(_BEFORE):
            trainer = Trainer(settings, folder, here)
            checkpoint.load_weights(trainer.model, state["model"], source)
        with _errors_in_one_line(_DURING):
            figures = trainer.evaluate()
    if here.is_main:
        print(json.dumps(figures, indent=2))


@contextmanager
def _errors_in_one_line(kinds: tuple[type[Exception], ...]):
    """Wrong settings, files and disks are the user's to mend: no traceback."""
    try:
        yield
    except kinds as error:
        sys.exit(f"error: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The message. A loader's worker sends its traceback with it, of which the last line is the message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1] if "worker process" in lines[0] else lines[0]


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    with _errors_in_one_line(_BEFORE):
        if chosen.list:
            print("\n".join(EXPERIMENTS))
            return
        if chosen.diff_config:
            print("\n".join(diff(*(to_dict(experiment(name)) for name in chosen.diff_config))))
            return
        settings, state = configure(chosen)
    if chosen.print_config:
        print(dumps(settings))
        return
    folder = Path(chosen.work_dir or f"work_dirs/{settings.name}")
    if settings.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with world(settings.run.timeout) as here:
        if state is None:
            train(settings, folder, here, chosen)
        else:
            evaluate(settings, folder, here, state, chosen.eval_only)


if __name__ == "__main__":
    record(main)()  # so that torchrun shows the error of the rank that failed

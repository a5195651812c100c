"""Trains an experiment, or evaluates a checkpoint.

python train/main.py --config completion_v2_tiny
torchrun --nproc-per-node 8 train/main.py --config completion_v2 --data /data/nuscenes --resume auto
python train/main.py --eval-only work_dirs/completion_v2_tiny/checkpoints/best.pt
tensorboard --logdir work_dirs
"""

import argparse
import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record

from rigfuse.train import checkpoint
from rigfuse.train.command_line import Parser
from rigfuse.train.config import Experiment, apply_options, diff, dumps, to_dict, update
from rigfuse.train.distributed import World, is_lost_rank, wait_for_all, world
from rigfuse.train.systems import EXPERIMENTS, experiment
from rigfuse.train.trainer import Trainer, TrainingError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--config", metavar="NAME", help=f"the experiment: {', '.join(EXPERIMENTS)}")
    add("--work-dir", metavar="FOLDER", help="where the run goes; default work_dirs/NAME")
    add("--data", metavar="ROOT", help="a folder in nuScenes format; default: the built-in drive")
    add("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], help="settings to change, like run.epochs=2")
    add("--resume", metavar="CKPT", nargs="?", const="auto", help="continue from a checkpoint; auto: the newest if any")
    add("--weights", metavar="CKPT", help="begin with the weights of another run, where names and shapes agree")
    add("--eval-only", metavar="CKPT", help="evaluate a checkpoint, with the settings it was trained with")
    add("--deterministic", action="store_true", help="two runs give bitwise equal weights")
    add("--profile", action="store_true", help="for nsys --capture-range=cudaProfilerApi: record run.profile_steps")
    add("--print-config", action="store_true", help="print the settings as JSON and end")
    add("--diff-config", metavar=("A", "B"), nargs=2, help="print the settings in which two experiments differ and end")
    chosen = parser.parse_args(arguments)
    if not (chosen.config or chosen.diff_config or chosen.eval_only):
        parser.error("needs --config NAME (--help lists them)")
    if chosen.resume and chosen.eval_only:
        parser.error("--resume trains on, --eval-only does not train; choose one")
    return chosen


def configure(chosen: argparse.Namespace) -> tuple[Experiment, dict | None]:
    """The settings, and the checkpoint to evaluate if there is one."""
    state = checkpoint.load(chosen.eval_only) if chosen.eval_only else None
    settings = experiment(chosen.config or state["config"]["name"])
    if state is not None and not chosen.config:
        update(settings, state["config"])
    if chosen.data:
        settings.data.root = chosen.data
    if chosen.deterministic:
        settings.run.deterministic = True
    return apply_options(settings, chosen.cfg_options), state


def resume_from(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to continue from. A folder with checkpoints is never trained over by accident."""
    existing = checkpoint.checkpoints(folder / "checkpoints")
    if resume is None:
        if existing:
            raise ValueError(f"{folder} holds a run already; --resume auto continues it, --work-dir takes another")
        return None
    if resume == "auto":
        return existing[0] if existing else None
    return Path(resume)


def train(settings: Experiment, folder: Path, here: World, chosen: argparse.Namespace) -> None:
    with _errors_in_one_line():
        resume = resume_from(chosen.resume, folder)
        wait_for_all()  # no rank writes before all have looked
        trainer = Trainer(settings, folder, here, resume=resume, profile=chosen.profile, weights=chosen.weights)
    if here.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(dumps(settings) + "\n")
        print(f"{dumps(settings)}\n{settings.name}: {trainer.total} steps, {here.size} rank(s), {folder}", flush=True)
    try:
        trainer.fit()
    except TrainingError as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if here.size == 1 or not is_lost_rank(error):
            raise
        where = f"rank {here.rank} lost another rank in the step after {trainer.counters.step}"
        sys.exit(f"error: {where}; --resume auto continues from the last checkpoint ({str(error).splitlines()[0]})")


def evaluate(settings: Experiment, folder: Path, here: World, state: dict, source: str) -> None:
    with _errors_in_one_line():
        trainer = Trainer(settings, folder, here)
        checkpoint.load_weights(trainer.model, state["model"], source)
    figures = trainer.evaluate()
    if here.is_main:
        print(json.dumps(figures, indent=2))


@contextmanager
def _errors_in_one_line():
    """Wrong settings and files are the user's to mend: no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, checkpoint.CheckpointError) as error:
        sys.exit(f"error: {error}")


def main(arguments: list[str] | None = None) -> None:
    chosen = parse(arguments)
    with _errors_in_one_line():
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

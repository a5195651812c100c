"""Tries one step of map detection before it is trained: sizes, parameter groups, gradients, what is frozen, memory.

    python train/tools/check_setup.py --config map_qformer_stage2 --meta         # sizes and memory of 7 B, without any
    python train/tools/check_setup.py --config map_qformer_stage2_tiny           # a step on made-up images
    python train/tools/check_setup.py --config map_qformer_stage2_tiny --data ROOT

Exit status 1 where a part has no gradient, or the language model has one or moves (by the sha256 of its weights).
"""

import argparse
import sys

import torch

from rigfuse.train.command_line import Parser, TextTable, console, in_one_line, patience
from rigfuse.train.config import apply_options, check
from rigfuse.train.systems import experiment
from rigfuse.train.systems.map_qformer.experiment import MapExperiment
from rigfuse.train.systems.map_qformer.first_step import (
    DOCUMENTS,
    made_up_batch,
    on_meta,
    one_step,
    parts_of,
)
from rigfuse.train.systems.map_qformer.memory import memory_of_step


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--config", metavar="NAME", required=True, help="an experiment of map_qformer")
    parser.add_argument("--data", metavar="ROOT", help="take a batch of this folder in nuScenes format")
    parser.add_argument("--meta", action="store_true", help="only count, on tensors without memory")
    parser.add_argument("--cfg-options", metavar="KEY=VALUE", nargs="+", default=[], help="settings to change")
    return parser.parse_args(arguments)


def sizes(parts, documents: bool) -> TextTable:
    """The parts; with `documents` beside the design documents' table."""
    table = TextTable("Parameters", ["part", "trained", "frozen", "gradient"], 1)
    for part in parts:
        gradient = "none" if part.gradient is None else f"{part.gradient:.3g}"
        table.rows.append(
            [DOCUMENTS.get(part.name, (part.name,))[0], f"{part.trained:,}", f"{part.frozen:,}", gradient]
        )
        if documents:
            count, (_, told) = (part.trained + part.frozen) / 1e6, DOCUMENTS.get(part.name, ("", None))
            table.rows[-1] += [f"{told:g} M", f"{count / told - 1:+.1%}"] if told else ["", ""]
    if documents:
        table.columns += ["documents", "off by"]
        table.note = "The language model has no head for the vocabulary here; a Llama of 7 B has 131 M there."
    return table


def main(arguments: list[str] | None = None) -> int:
    chosen, screen = parse(arguments), console()
    with in_one_line("check_setup", ValueError, OSError, ImportError):
        settings = experiment(chosen.config)
        if not isinstance(settings, MapExperiment):
            raise ValueError(f"--config is {chosen.config}; needs an experiment of map_qformer")
        settings.data.root = chosen.data or ""
        check(apply_options(settings, chosen.cfg_options))
        batch = settings.loader.batch_size
        if chosen.meta:
            model = on_meta(settings)
            parts, problems = parts_of(model), []
        else:
            torch.manual_seed(settings.run.seed)
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            with patience(f"{chosen.config}: one step"):
                if chosen.data:
                    samples = settings.build_data()[0]
                    data = settings.collate([samples[0, index] for index in range(min(batch, len(samples)))])
                else:
                    data = made_up_batch(settings)
                report = one_step(settings, data, device)
            parts, problems = report.parts, report.problems()
    sizes(parts, chosen.config == "map_qformer_stage2").print(screen)
    if chosen.meta:
        memory = memory_of_step(settings, model, parts)
        table = TextTable(f"Memory of a step of {batch} samples, estimated", ["what", "GiB"], 1)
        table.rows += [[name, f"{value:.2f}"] for name, value in memory.items()]
        table.print(screen)
    else:
        groups = TextTable("Parameter groups", ["group", "learning rate", "parameters"], 1)
        groups.rows += [[name, f"{rate:.2e}", f"{count:,}"] for name, rate, count in report.groups]
        groups.print(screen)
        screen.print("losses: " + ", ".join(f"{name} {value:.4f}" for name, value in report.losses.items()))
        screen.print(f"peak memory of this process or GPU: {report.peak_mib:.0f} MiB")
        if report.same_model is not None:
            now = "the same" if report.same_model else "another"
            screen.print(f"the language model's sha256 is {now} after the step")
    for problem in problems:
        print(f"check_setup: {problem}", file=sys.stderr)
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())

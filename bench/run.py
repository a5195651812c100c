"""Measures V2 against V1, an operation against its peers, or the detector. `python bench/run.py --help`, `--list`.

Exit status: 0 done; 1 a result was wrong, nothing could be measured, or (with --check-claims) a claim does not hold;
2 the command line is mistaken.
"""

import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rigfuse.bench import claims, facts, plots, report, results
from rigfuse.bench.cases import CASES
from rigfuse.bench.floors import measure_machine
from rigfuse.bench.options import Request, UsageError, parse, resolve
from rigfuse.bench.profiling import profile_on_cpu, profile_on_cuda
from rigfuse.bench.runner import Outcome, Runner, Settings, Skipped
from rigfuse.bench.subjects import compare
from rigfuse.bench.subjects import detector_step as detector
from rigfuse.bench.subjects.operations import OPERATIONS, make_workload
from rigfuse.bench.workload import Unavailable


def workloads(request: Request, skip: Callable[[Skipped], None] = lambda skipped: None):
    """One after another, so that one at a time is in memory."""
    for scope, case in request.places:
        try:
            if request.subject == compare.SUBJECT:
                yield compare.make_workload(scope, CASES[case], request.providers, request.device, request.drives)
            elif request.subject == detector.SUBJECT:
                yield detector.make_workload(detector.CASES[case], request.providers, request.device, request.drives)
            else:
                yield make_workload(OPERATIONS[request.subject], case, request.device)
        except Unavailable as reason:
            skip(Skipped(scope, case, "all", str(reason)))


def measure(request: Request, console: Console) -> Outcome:
    settings = Settings(request.device, request.dtype, request.modes, **request.effort)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("measuring this machine", total=None)
        machine = measure_machine(request.device, request.dtype)

        def advance(what, done):
            total = runner.steps(len(request.places))
            progress.update(task, total=total, description=what, completed=done)

        runner = Runner(settings, machine, advance)
        for workload in workloads(request, runner.outcome.skipped.append):
            runner.run(workload)
    return runner.outcome


def tables(request: Request, outcome: Outcome, judged: list[claims.Claim]) -> list[report.TextTable]:
    """What the terminal and report.md show."""
    shown = report.measurement_tables(outcome, request.baseline)
    if judged:
        shown.insert(0, report.claims_table(judged))
    if request.earlier is not None:
        shown.append(report.against_table(outcome.rows, request.earlier[0], str(request.against)))
    if outcome.skipped:
        shown.append(report.skipped_table(outcome.skipped))
    return shown


def judge(request: Request, outcome: Outcome) -> list[claims.Claim]:
    if request.subject == detector.SUBJECT:
        return claims.judge_detector(outcome)
    if not {"v1", "v2"} <= set(request.providers):
        return []
    return claims.judge(outcome, request.cases, request.modes, torch.finfo(request.dtype).eps)


@contextmanager
def new_folder(path: Path):
    """A folder to write to, which becomes `path` when all is done; nothing is left behind where something fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.parent / f".{path.name}.partial-{os.getpid()}"
        partial.mkdir()
    except OSError as error:
        raise UsageError(f"--out {path}: {error.strerror}") from error
    try:
        yield partial
        partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_report(folder: Path, request: Request, command: str, outcome: Outcome, found: dict, shown: list) -> None:
    results.write(folder / "results.jsonl", outcome.rows, found)
    pictures = plots.draw(outcome, folder)
    if request.subject == compare.SUBJECT:
        pictures += plots.draw_geometry(request.drives, folder)
    lines = [f"# {request.subject}", "", report_headline(request, found), "", f"    {command}", ""]
    if request.earlier is not None:
        lines += [f"- {warning}" for warning in report.against_warnings(found, request.earlier[1])] + [""]
    lines += [table.markdown() for table in shown]
    lines += [f"![{name}]({name})\n" for name in pictures] + [report.HOW_TO_READ]
    (folder / "report.md").write_text("\n".join(lines))


def report_headline(request: Request, found: dict) -> str:
    dtype = str(request.dtype).removeprefix("torch.")
    geometry = f"geometry of {Path(request.data).name}" if request.data else "built-in geometry"
    return f"{facts.headline(found)} · {dtype} · {geometry}"


def run(request: Request, command: str, console: Console) -> int:
    if request.profile and request.device.type == "cuda":
        profile_on_cuda(workloads(request), request.dtype, request.modes)
        return 0
    with new_folder(request.out) as folder:
        if request.profile:
            profile_on_cpu(workloads(request), request.dtype, request.modes, folder)
            failed = False
        else:
            found = facts.collect(request.device)
            outcome = measure(request, console)
            judged = judge(request, outcome)
            shown = tables(request, outcome, judged)
            write_report(folder, request, command, outcome, found, shown)
            console.print(report_headline(request, found))
            for table in shown:
                table.print(console)
            failed = bool(outcome.wrong) or not any(row.metric == "time_ms" for row in outcome.rows)
            failed |= request.check_claims and not all(claim.holds or claim.expected for claim in judged)
    console.print(f"written to {request.out}")
    return int(failed)


def show_list(console: Console) -> None:
    providers = [[name, provider.about] for name, provider in compare.PROVIDERS.items()]
    report.TextTable("--compare PROVIDER …", ["provider", "what it is"], 2, providers).print(console)
    scopes = [[name, about] for name, about in compare.SCOPES.items()]
    report.TextTable("--scope SCOPE …", ["scope", "what is measured"], 2, scopes).print(console)
    cases = []
    for case in CASES.values():
        height, width = case.size
        numbers = [f"{height}×{width}", str(case.moments), str(case.batch), "yes" if case.quick else ""]
        cases.append([case.name, case.about, *numbers])
    report.TextTable("--case CASE …", ["case", "what it is", "cells", "T", "B", "--quick"], 2, cases).print(console)
    detectors = [[name, provider.about] for name, provider in detector.PROVIDERS.items()]
    detectors += [[f"--case {case.name}", case.about] for case in detector.CASES.values()]
    report.TextTable("--detector", ["provider, case", "what it is"], 2, detectors).print(console)
    operations = [[name, ", ".join(op.providers), ", ".join(op.cases)] for name, op in OPERATIONS.items()]
    report.TextTable("--op NAME", ["operation", "measured", "cases"], 3, operations).print(console)


def main(argv: list[str] | None = None) -> int:
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        arguments = parse(argv)
        if arguments.list:
            show_list(console)
            return 0
        command = shlex.join(["python", "bench/run.py", *(sys.argv[1:] if argv is None else argv)])
        return run(resolve(arguments), command, console)
    except UsageError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; nothing was written", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())

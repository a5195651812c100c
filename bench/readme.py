"""Writes the parts of a Markdown file that come from the benchmark: what there is, and what was measured.

    python bench/readme.py README.md            # print what would be written
    python bench/readme.py README.md --write

Such a part stands between two comments, `<!-- bench:PART -->` and `<!-- /bench -->`. PART is

operations       every operation and what it is measured against
subjects         what bench/run.py measures
results FOLDER [CASE … MODE …]  the comparison's and the operations' results in the folders of FOLDER, which is seen
                 from the Markdown file; of these cases and modes alone
"""

import re
import sys
from pathlib import Path

from rigfuse.bench import facts, report, results
from rigfuse.bench.operation import PLAIN, TOOLKIT
from rigfuse.bench.operation import SCOPE as OPERATION
from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.subjects import SUBJECTS
from rigfuse.bench.workload import MODE_NAMES
from rigfuse.train.command_line import Parser, TextTable, UsageError, choose, in_one_line

_PART = re.compile(r"(<!-- bench:([^>]*?) -->\n).*?(<!-- /bench -->)", re.DOTALL)


def operations(base: Path) -> str:
    rows = [[f"`{op.name}`", ", ".join([PLAIN, *op.all_peers])] for op in OPERATIONS.values()]
    return TextTable("", ["operation", "measured against"], 2, rows).markdown(heading=False)


def subjects(base: Path) -> str:
    rows = [[f"`bench/run.py --{subject.option}`", subject.about] for subject in SUBJECTS.values()]
    return TextTable("", ["command", "what it does"], 2, rows).markdown(heading=False)


def measured(base: Path, name: str = "", *only: str) -> str:
    """A table of stage 1 and one of the operations, and on what they were measured."""
    modes = [word for word in only if word in MODE_NAMES]
    cases = [word for word in only if word not in MODE_NAMES]
    folder = base / name
    if not name or not folder.is_dir():
        raise UsageError(f"{folder} is not a folder with results")
    rows, sources = [], {}
    for path in sorted(folder.glob(f"*/{results.FILE}")):
        found, its_facts = results.read(path.parent)
        found = [row for row in found if (row.subject, row.scope) == ("compare", "temporal") or row.scope == OPERATION]
        found = [row for row in found if (not cases or row.case in cases) and (not modes or row.mode in modes)]
        if found:
            sources.setdefault(facts.headline({"dirty": None, **its_facts}), []).append(path.parent.name)
        rows += found
    own = [row for row in rows if row.scope == OPERATION]
    compared = [row for row in rows if row.scope != OPERATION]
    parts = ([_stage(compared)] if compared else []) + ([_operations(own)] if own else [])
    parts.append(" ".join(f"{', '.join(names)}: {source}." for source, names in sources.items()) + "\n")
    return "\n".join(parts)


def _stage(rows):
    """V2 beside V1 as the documents have it and beside what one writes today, where that was measured."""
    table = results.Table(rows)
    others = [name for name in ("v1", "v1-sdpa", "v2-sdpa") if any(row.provider == name for row in rows)]
    columns = ["stage 1", "", "v2 ms", *(f"against {name}" for name in others)]
    text = TextTable("", [*columns, *(f"MB, {name}" for name in (*others, "v2"))], left=2)
    for case, mode in dict.fromkeys((row.case, row.mode) for row in rows):
        get = lambda name, metric, at=(case, mode): table.get("temporal", at[0], name, at[1], metric)  # noqa: E731
        unsure = " (cannot tell)" if table.disturbed("temporal", case, mode, "time_ms") else ""
        speeds = [report.speed(get(name, "time_ms"), get("v2", "time_ms")) for name in others]
        speeds = [speed if speed == "—" else speed + unsure for speed in speeds]
        memory = [report.megabytes(get(name, "peak_bytes")) for name in (*others, "v2")]
        text.rows.append([case, MODE_NAMES[mode], report.time(get("v2", "time_ms")), *speeds, *memory])
    return text.markdown(heading=False)


def _operations(rows):
    """Each operation at each case, against eager and against whatever peer was the fastest."""
    text = TextTable("", ["operation", "case", "", "ms", "against eager", "against the best peer", "memory"], left=3)
    for name, case, mode in dict.fromkeys((row.subject, row.case, row.mode) for row in rows):
        place = (name, case, mode)
        here = {(row.provider, row.metric): row for row in rows if (row.subject, row.case, row.mode) == place}
        own, plain = here.get((TOOLKIT, "time_ms")), here.get((PLAIN, "time_ms"))
        equal = OPERATIONS[name].equal if name in OPERATIONS else {}
        peers = [row for (peer, metric), row in here.items() if metric == "time_ms" and peer in equal]
        peers = sorted((row for row in peers if row.provider not in (TOOLKIT, PLAIN)), key=lambda row: row.value)
        best = f"{report.speed(peers[0], own)} {peers[0].provider}" if peers and own else "—"
        memory = report.share(here.get((PLAIN, "peak_bytes")), here.get((TOOLKIT, "peak_bytes")))
        speed = report.speed(plain, own)
        text.rows.append([f"`{name}`", case, MODE_NAMES[mode], report.time(own), speed, best, memory])
    return text.markdown(heading=False)


PARTS = dict(operations=operations, subjects=subjects, results=measured)


def filled(path: Path) -> str:
    """The file's text with every part made anew; raises UsageError for a part that there is not."""

    def make(found):
        name, *words = found[2].split()
        return f"{found[1]}{PARTS[choose('part', name, PARTS)](path.parent, *words)}{found[3]}"

    return _PART.sub(make, path.read_text())


def main(argv: list[str] | None = None) -> int:
    parser = Parser(__doc__, prog="readme.py")
    parser.add_argument("file", type=Path, metavar="FILE.md")
    parser.add_argument("--write", action="store_true", help="change the file instead of printing it")
    with in_one_line("readme.py", OSError, results.ResultsError):
        chosen = parser.parse_args(argv)
        text = filled(chosen.file)
        if chosen.write:
            chosen.file.write_text(text)
        else:
            print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a Markdown file says of the benchmark comes from the benchmark."""

import json
import re
from pathlib import Path

import pytest

from rigfuse.bench import readme
from rigfuse.bench.operations import OPERATIONS
from rigfuse.bench.subjects import SUBJECTS

ROOT = Path(readme.__file__).parents[1]
FACTS = dict(commit="0123456789ab", dirty=False, hardware=dict(cpu="A CPU", threads=2), versions=dict(torch="2.13.0"))


def row(subject, scope, case, provider, mode, metric, samples):
    place = dict(subject=subject, scope=scope, case=case, provider=provider, device="cpu", dtype="float32", mode=mode)
    return place | dict(metric=metric, value=sorted(samples)[len(samples) // 2], samples=samples) | FACTS


@pytest.fixture
def document(tmp_path):
    """A Markdown file beside results of a comparison and of an operation."""
    times = dict(v1=[10.0] * 5, **{"v1-sdpa": [8.0] * 5}, v2=[4.0] * 5)
    compared = [row("compare", "temporal", "documents", name, "fwd", "time_ms", times[name]) for name in times]
    compared += [row("compare", "temporal", "documents", name, "fwd", "peak_bytes", [1e6]) for name in times]
    for name in ("v1", "v2"):
        disturbed = [value * factor for value, factor in zip(times[name], (1, 1, 5, 5, 5))]
        compared.append(row("compare", "temporal", "upstream", name, "fwd", "time_ms", disturbed))
    times = dict(eager=[3.0] * 3, rigfuse=[2.0] * 3, compile=[4.0] * 3, sdpa=[1.0] * 3)
    place = ("cross_camera_attention", "operation", "documents")
    own = [row(*place, name, "fwd", "time_ms", times[name]) for name in times]
    for name, rows in dict(compare=compared, attention=own).items():
        (tmp_path / "results" / name).mkdir(parents=True)
        lines = [json.dumps(line) + "\n" for line in rows]
        (tmp_path / "results" / name / "results.jsonl").write_text("".join(lines))
    path = tmp_path / "README.md"
    parts = ["operations", "subjects", "results results", "results results documents"]
    path.write_text("# Title\n" + "".join(f"<!-- bench:{part} -->\nold\n<!-- /bench -->\nkept\n" for part in parts))
    return path


def test_every_part_is_made_anew_and_nothing_else_changes(document, capsys):
    assert readme.main([str(document)]) == 0
    printed = capsys.readouterr().out
    assert "old" in document.read_text() and "old" not in printed
    assert readme.main([str(document), "--write"]) == 0
    assert document.read_text() == printed == readme.filled(document)
    assert printed.count("kept\n") == 4 and printed.startswith("# Title\n<!-- bench:operations -->\n")
    assert all(f"`{name}`" in printed for name in OPERATIONS) and all(f"--{name}`" in printed for name in SUBJECTS)
    assert "| documents | forward | 4 (4–4) | 2.5× (2.5–2.5) | 2× (2–2) | 1 | 1 | 1 |" in printed
    assert printed.count("(cannot tell)") == printed.count("| upstream | forward |") == 1  # one part names a case
    assert "1.5× (1.5–1.5) | 0.5× (0.5–0.5) sdpa |" in printed  # the fastest peer, though faster than the operation
    assert "attention, compare: A CPU, 2 threads · torch 2.13.0 · commit 0123456789ab.\n" in printed


@pytest.mark.parametrize(
    "part, said",
    [
        ("opertions", "no part 'opertions'; did you mean 'operations'?"),
        ("results nowhere", "nowhere is not a folder with results"),
        ("results", "is not a folder with results"),
    ],
)
def test_a_part_that_cannot_be_made_is_one_line_and_changes_nothing(part, said, tmp_path, capsys):
    path = tmp_path / "README.md"
    path.write_text(f"<!-- bench:{part} -->\nold\n<!-- /bench -->\n")
    with pytest.raises(SystemExit):
        readme.main([str(path), "--write"])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "old" in path.read_text()


def test_the_readme_says_what_was_measured_and_is_short():
    """Its table is that of the committed results, and each figure has its source beside it."""
    path = ROOT / "README.md"
    text = path.read_text()
    assert readme.filled(path) == text and "<!-- bench:results bench/results/" in text
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("path", sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]), ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    links = re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", path.read_text())
    local = [one or other for one, other in links if not (one or other).startswith("http")]
    assert [link for link in local if not (path.parent / link).exists()] == []

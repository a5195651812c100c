import shlex

import pytest
from mutants import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["what"])
def test_the_fault_can_be_planted(fault):
    assert (ROOT / fault["file"]).read_text().count(fault["text"]) == 1
    assert fault["instead"] != fault["text"]
    assert all((ROOT / name).exists() for name in shlex.split(fault["tests"]) if name.startswith("tests/"))

import pytest
from mutants import FAULTS, ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["what"])
def test_the_fault_can_be_planted(fault):
    assert (ROOT / fault["file"]).read_text().count(fault["text"]) == 1
    assert fault["instead"] != fault["text"] and all((ROOT / tests).exists() for tests in fault["tests"].split())

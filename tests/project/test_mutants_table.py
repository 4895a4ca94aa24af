"""What `make mutants` changes is still there: it takes minutes, so it is run rarely."""

import pytest

from bench import ROOT
from mutants.table import NAMED, PARTS


@pytest.mark.parametrize("change", NAMED, ids=lambda change: change.what)
def test_a_named_change_has_its_line(change):
    assert [line.strip() for line in (ROOT / change.file).read_text().splitlines()].count(change.old) == 1


def test_files_and_their_tests_are_there():
    paths = {file for part in PARTS for file in part.tests}
    paths |= {f"tests/{test.split('::')[0]}" for part in PARTS for tests in part.tests.values() for test in tests}
    assert len(paths) > 50 and all((ROOT / path).exists() for path in paths)


def test_what_changes_nothing_is_still_there():
    """Entries of file, old line, new line and reason; see `report.read_equivalents`."""
    entries = (ROOT / "tests/mutants/equivalent.txt").read_text().strip().split("\n\n")
    for file, old, new, _ in (entry.split("\n") for entry in entries if not entry.startswith("#")):
        assert new.startswith("+ ")
        assert old.removeprefix("- ") in map(str.strip, (ROOT / file).read_text().splitlines()), (file, old)

"""For every test: the asserts in support/ say what they found, as those of the tests do; fixtures exist."""

import pytest

pytest.register_assert_rewrite("support")


def pytest_collection_modifyitems(items):
    """Tests that are skipped here must find their fixtures too: pytest would only say so where they run, on a GPU."""
    for item in items:
        if isinstance(item, pytest.Function):
            missing = set(item.fixturenames) - item._fixtureinfo.name2fixturedefs.keys() - {"request"}
            if missing:
                raise pytest.UsageError(f"{item.nodeid}: there is no fixture {', '.join(missing)}")

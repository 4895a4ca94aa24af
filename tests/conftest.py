"""For every test: the asserts in support/ say what they found, as those of the tests do."""

import pytest

pytest.register_assert_rewrite("support")

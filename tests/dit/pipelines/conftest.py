"""Small pipelines with random weights."""

import pytest

from support.pipes import make_pipe


@pytest.fixture(params=["dit", "alpha-1024", "sigma"])
def pipe(request):
    return make_pipe(request.param)


@pytest.fixture
def dit():
    return make_pipe("dit")


@pytest.fixture
def sigma():
    return make_pipe("sigma")

"""`cached_forward` under torch.compile: one graph a row, none on the second run."""

from itertools import product

import pytest
import torch

import harmonica_kernels as hk


@pytest.fixture(autouse=True)
def recompile_limit():
    """As torch.compile(recompile_limit=10) has it, from torch 2.13 on."""
    with torch._dynamo.config.patch(recompile_limit=10):
        yield


def test_compile_one_graph_a_row():
    """More distinct rows than dynamo's default limit of 8: a graph each, and a second trajectory compiles none."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    branches = [hk.Branch(lambda h, c: torch.tanh(h) * c) for _ in range(4)]
    mod = hk.Modulation(*([torch.randn(2, 8) for _ in range(n)] for n in (5, 5, 4)))
    rows = list(product((True, False), repeat=4))[:10]
    counter = CompileCounterWithBackend("aot_eager")

    def model(x, row, cache):
        return hk.cached_forward(branches, x, mod, row=row, cache=cache, context=2.0)

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 4, 8)

    def trajectory(call):
        cache, y = hk.FeatureCache(), x
        for row in rows:
            y = call(y, row, cache)
        return y

    with torch.no_grad():
        expected = trajectory(model)
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == len(rows) == len(set(rows))
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == len(rows)


def test_compile_with_forecasts():
    """FORA n=2 with forecasts: its first two steps differ, for the cache fills; then two graphs serve every step."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    branches = [hk.Branch(lambda h, c: torch.tanh(h)) for _ in range(3)]
    mod = hk.Modulation(*([torch.randn(2, 8) for _ in range(n)] for n in (4, 4, 3)))
    rows = [((s % 2 == 0,) * 3, (0.5,) * 3 if s % 2 and s > 1 else None) for s in range(10)]
    counter = CompileCounterWithBackend("aot_eager")

    def model(x, row, e, cache):
        return hk.cached_forward(branches, x, mod, row=row, forecast_weights=e, cache=cache)

    compiled = torch.compile(model, fullgraph=True, backend=counter)
    x = torch.randn(2, 4, 8)

    def trajectory(call):
        cache, y = hk.FeatureCache(2), x
        for row, e in rows:
            y = call(y, row, e, cache)
        return y

    with torch.no_grad():
        expected = trajectory(model)
        torch.testing.assert_close(trajectory(compiled), expected)
        graphs = counter.frame_count
        assert graphs <= 5
        torch.testing.assert_close(trajectory(compiled), expected)
        assert counter.frame_count == graphs

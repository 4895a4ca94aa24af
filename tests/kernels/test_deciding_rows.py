"""Rows that decide within the forward: the first run is computed, a function of what it adds says the rest."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.cache import run_spans
from support.naive_forward import K, Toy


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("runs", [(2, 2), (3, 1), (2, 1, 1)])
def test_a_function_decides_on_all_runs_but_the_first(runs, grad):
    """It is shown what the first run adds, and what it added when the others were last computed."""
    toy, cache, spans = Toy(), hk.FeatureCache(runs=runs), run_spans(runs, K)
    asked, reference, kept = [], None, []

    def decide(added, since):
        asked.append((added.clone(), since.clone()))
        return len(asked) in (3, 4, 7)

    with torch.set_grad_enabled(grad):
        for s in range(9):
            x = torch.randn_like(toy.x, requires_grad=grad)
            toy.calls.clear()
            y = toy(x, row=decide if s else None, cache=cache)
            computed = s in (0, 3, 4, 7)
            assert {k for k, _ in toy.calls} == set(range(K if computed else runs[0]))
            stream = toy.through(x, 0, runs[0])
            added = (stream - x).detach()
            if s:
                torch.testing.assert_close(asked[-1], (added, reference))
            if computed:
                reference, kept = added, []
                for first, end in spans[1:]:
                    after = toy.through(stream, first, end)
                    # a run of one branch keeps its output before the gate
                    kept.append(toy.outputs[0] if end - first == 1 else (after - stream).detach())
                    stream = after
            else:
                for (first, end), o in zip(spans[1:], kept, strict=True):
                    gate = toy.mod.gate[first] if end - first == 1 else None
                    stream = stream + (o if gate is None else gate.unsqueeze(1) * o)
            expected = torch.nn.functional.layer_norm(stream, x.shape[-1:], eps=1e-6)
            torch.testing.assert_close(y, expected * (1 + toy.mod.scale[K][:, None]) + toy.mod.shift[K][:, None])
    assert len(asked) == 8 and cache.nbytes == len(runs) * toy.x.nbytes


def test_a_row_that_decides_needs_runs_and_what_it_may_reuse():
    toy = Toy()
    with torch.no_grad():
        for runs in (None, (1, 3), (4,)):
            cache = hk.FeatureCache(runs=runs)
            toy(toy.x, cache=cache)
            with pytest.raises(ValueError, match="row: a function decides on runs of branches; .* got runs="):
                toy(toy.x, row=lambda added, reference: True, cache=cache)
        with pytest.raises(ValueError, match="row: a function decides on runs"):
            toy(toy.x, row=lambda added, reference: True)
        with pytest.raises(ValueError, match=r"row\[1\]: the cache holds no output"):
            toy(toy.x, row=lambda added, reference: True, cache=hk.FeatureCache(runs=(2, 2)))
        cache = hk.FeatureCache(runs=(2, 2))
        toy(toy.x, cache=cache)
        with pytest.raises(ValueError, match=r"forecast_weights\[1\]: a forecast needs"):
            toy(toy.x, row=lambda added, reference: False, cache=cache, forecast_weights=(0.0, 1.0))

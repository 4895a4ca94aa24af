"""λ against the T² computation that shares nothing, to the last bit, and how many forwards it takes."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_dit.train.importance import measure_importance, normalise


def generate(router, trajectory, noise, routed, rows):
    """One image from the start: the router's rows at the steps in `routed`, everything computed at the others."""
    x, cache, decisions = trajectory.start(noise), hk.FeatureCache(router.history), []
    for s in range(router.steps):
        if s not in routed:
            row, forward = [True] * len(router.branches), {}
        else:
            r = router.scores()[s]
            row = [score > router.threshold for score in r.tolist()]
            e = None
            if router.coefficients is not None:
                e = [router.coefficients[s - 1][k].item() * ratio(decisions, s, k) for k in range(len(row))]
            if rows == "hard":
                forward = dict(row=row, forecast_weights=e and [0.0 if c else v for c, v in zip(row, e, strict=True)])
            else:
                forward = dict(row=r, threshold=router.threshold, forecast_weights=e and torch.tensor(e))
        decisions.append(row)
        x = trajectory.advance(trajectory.predict(x, s, cache=cache, **forward), s, x)
    return x


def ratio(decisions, s, k):
    at = [i for i in range(s) if decisions[i][k]]
    return torch.tensor((s - at[-1]) / (at[-1] - at[-2])).item() if len(at) > 1 else 0.0


@torch.no_grad()
def naive(router, new_trajectory, noise, kind, rows):
    T = router.steps
    result = [torch.tensor(0.0)]
    for s in range(1, T):
        with_row = range(1, T) if kind == "paper" else range(1, s + 1)
        without = [i for i in with_row if i != s]
        images = [generate(router, new_trajectory(), noise, routed, rows) for routed in (with_row, without)]
        result.append((images[0] - images[1]).square().mean())
    return torch.stack(result)


@pytest.mark.parametrize("coefficients", [False, True])
@pytest.mark.parametrize("rows", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["paper", "reference"])
@pytest.mark.parametrize("scheduler", ["ddim", "DPMSolverMultistepScheduler", "DDPMScheduler"])
def test_equals_the_naive_computation_bit_for_bit(make_router, make_trajectory, noise, kind, rows, coefficients,
                                                  scheduler):
    router = make_router(coefficients=coefficients)

    def new_trajectory():
        return make_trajectory(scheduler=scheduler)

    found = measure_importance(router, new_trajectory(), noise, kind=kind, rows=rows)
    assert torch.equal(found, naive(router, new_trajectory, noise, kind, rows))
    assert (found[1:] > 0).any() and found[0] == 0


@torch.no_grad()
def test_gain_is_the_papers_importance_by_the_error_at_its_step(make_router, make_trajectory, noise):
    router, trajectory, cache = make_router(), make_trajectory(), hk.FeatureCache()
    x, errors = trajectory.start(noise), [torch.tensor(1.0)]
    for s in range(5):
        row = dict(row=router.scores()[s], threshold=router.threshold) if s else {}
        everything, output = trajectory.predict(x, s), trajectory.predict(x, s, cache=cache, **row)
        if s:
            errors.append((output - everything)[:, :1].square().mean())  # channel 1, the variance, moves no pixel
        x = trajectory.advance(output, s, x)
    gains, raw = (measure_importance(router, make_trajectory(), noise, kind=kind) for kind in ("gain", "paper"))
    torch.testing.assert_close(gains, raw / torch.stack(errors), rtol=1e-3, atol=0)


@pytest.mark.parametrize("T", [2, 5])
@pytest.mark.parametrize("kind", ["paper", "reference", "gain"])
def test_forwards(net, make_router, make_trajectory, noise, kind, T):
    router, calls = make_router(T), []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    measure_importance(router, make_trajectory(T), noise, kind=kind)
    handle.remove()
    assert len(calls) == T + T * (T - 1) // 2


def test_without_importance_every_row_that_learns_counts_alike_and_nothing_is_run(make_router, make_trajectory, noise):
    trajectory = make_trajectory()
    trajectory.executor = None
    assert measure_importance(make_router(), trajectory, noise, kind="none").tolist() == [0, 1, 1, 1, 1]


def test_a_row_that_computes_everything_has_no_importance_when_hard(make_router, make_trajectory, noise):
    router = make_router()
    with torch.no_grad():
        router.logits[1].fill_(5)
    for kind in ("paper", "reference"):
        assert measure_importance(router, make_trajectory(), noise, kind=kind, rows="hard")[2] == 0
        assert measure_importance(router, make_trajectory(), noise, kind=kind, rows="soft")[2] > 0


def test_normalised_to_mean_one_over_the_rows_that_learn():
    assert normalise(torch.tensor([0.0, 1, 2, 3])).tolist() == [0, 0.5, 1, 1.5]
    assert normalise(torch.zeros(4)).tolist() == [1] * 4

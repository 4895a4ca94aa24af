"""A schedule that forecasts the trunk, decided on the device, against `cached_forward` step by step."""

import random

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs.gated import executor
from harmonica_kernels.graphs.gated.plan import If, Op, plan
from harmonica_kernels.ops import guided_step
from support.graph_stand_in import Built, Recorder
from support.loops import Forecasts, Table, Trajectory, compile_gated


@torch.no_grad()
def run_step_by_step(trajectory, noise, forecasts):
    x, mod, n = trajectory.start(noise), trajectory.modulation(), len(noise)
    cache = hk.TrunkCache(forecasts.history)
    for s, (computed, weights) in enumerate(zip(forecasts.compute, forecasts.weights)):
        rows = hk.Modulation(*([None if row is None else row[s] for row in part] for part in mod))
        y = hk.cached_forward(trajectory.branches, trajectory.embed(x), rows, row=None if computed else False,
                              forecast_weights=weights, cache=cache, context=0.01, eps=trajectory.eps)
        output = trajectory.head(y)
        x = guided_step(x, output[:n], output[n:] if len(output) > n else None, guidance=trajectory.guidance,
                        channels=trajectory.channels, table=trajectory.updates, step=torch.tensor([s]))
    return x


def test_equals_cached_forward_on_random_schedules():
    """One graph for every schedule and forecaster of a history; a longer one makes another."""
    for _ in range(25):
        T, H = random.randint(2, 9), random.randint(1, 4)
        trajectory, gated = Trajectory(T, random.randint(1, 5), n=random.randint(1, 2)), compile_gated()
        for _ in range(8):
            forecasts = Forecasts(T, H, trajectory.D, dense=random.random())
            noise = torch.randn(trajectory.shape)
            expected = run_step_by_step(trajectory, noise, forecasts)
            torch.testing.assert_close(gated(trajectory, noise, forecasts), expected, rtol=1e-4, atol=1e-5)
            assert gated.reused.flatten().tolist() == [not computed for computed in forecasts.compute]
        assert gated.graphs == 1


def test_a_longer_history_and_the_other_unit_are_other_graphs():
    trajectory, gated = Trajectory(5, 3), compile_gated()
    for forecasts in (Forecasts(5, 1, trajectory.D), Forecasts(5, 3, trajectory.D), Forecasts(5, 2, trajectory.D)):
        noise = torch.randn(trajectory.shape)
        torch.testing.assert_close(gated(trajectory, noise, forecasts), run_step_by_step(trajectory, noise, forecasts),
                                   rtol=1e-4, atol=1e-5)
        assert gated.graphs == 1
    gated(trajectory, noise, Table(torch.rand(5, 3)))
    assert gated.graphs == 2
    again = gated(trajectory, noise, forecasts)
    torch.testing.assert_close(again, run_step_by_step(trajectory, noise, forecasts), rtol=1e-4, atol=1e-5)
    assert gated.graphs == 2


def test_what_another_trajectory_left_has_no_effect():
    """Also where it is not a number: a state that has no weight is not read into the sum as 0·NaN."""
    trajectory, gated = Trajectory(6, 3), compile_gated()
    forecasts, noise = Forecasts(6, 4, trajectory.D, dense=0.3), torch.randn(trajectory.shape)
    gated(trajectory, torch.full_like(noise, torch.nan), forecasts)
    torch.testing.assert_close(gated(trajectory, noise, forecasts), run_step_by_step(trajectory, noise, forecasts),
                               rtol=1e-4, atol=1e-5)


def test_the_built_graph_equals_the_walk(monkeypatch):
    for _ in range(10):
        T, H = random.randint(2, 6), random.randint(1, 3)
        trajectory, walked = Trajectory(T, random.randint(1, 4)), compile_gated()
        with monkeypatch.context() as patch:
            built = Built(patch).executor
            for _ in range(5):
                forecasts, noise, images = Forecasts(T, H, trajectory.D), torch.randn(trajectory.shape), []
                for one in (built, walked):
                    with monkeypatch.context() as inner:
                        if one is walked:
                            inner.setattr(executor, "builds_graphs", lambda device: False)
                        images.append(one(trajectory, noise, forecasts))
                assert torch.equal(*images) and torch.equal(built.reused, walked.reused)
            assert Recorder.last.launches == 5 and built.graphs == 1
            assert Recorder.last.recording == 4, "modulation, embedding, trunk and head, each recorded once"


def test_a_forecast_step_runs_no_branch():
    """In the plan one condition stands around all of them; what runs at every step are embedding, weighing and head."""
    _, _, loop = plan(7, unit="trunk")
    decide, embed, whole, head = loop.body
    assert (decide.first, decide.last) == (0, 1) and isinstance(whole, If)
    assert [op.kind for part in (embed, head) for op in part.ops] == ["embed", "weigh", "head", "update"]
    assert whole.body[0].ops == (Op("trunk"),)
    trajectory, gated = Trajectory(4, 3), compile_gated()
    forecasts = Forecasts(4, 1, trajectory.D, dense=0.0)
    called, branch = [], Trajectory._branch

    class Watched(Trajectory):
        def _branch(self, k):
            plain = branch(self, k)
            return hk.Branch(lambda h, c: called.append(k) or plain.body(h, c), None, plain.norm, plain.gate, plain.eps)

    trajectory.__class__ = Watched
    trajectory._relabelled = lambda labels: trajectory
    gated(trajectory, torch.randn(trajectory.shape), forecasts)
    assert called == [0, 1, 2]


@pytest.mark.parametrize("final", [False, True])
def test_a_model_without_modulation(final):
    """Of its branches, or of the final norm."""
    trajectory, gated = Trajectory(5, 2), compile_gated()
    K, forecasts, noise = trajectory.K, Forecasts(5, 2, trajectory.D), torch.randn(trajectory.shape)
    if final:
        plain = trajectory.modulation

        def modulation():
            mod = plain()
            return hk.Modulation([*mod.shift[:K], None], [*mod.scale[:K], None], mod.gate)
    else:
        trajectory.kinds = [(out, norm, False, eps) for out, norm, _, eps in trajectory.kinds]
        trajectory.rows = [(False,) * 3] * K
        modulation = trajectory.modulation
    trajectory.modulation = modulation
    torch.testing.assert_close(gated(trajectory, noise, forecasts), run_step_by_step(trajectory, noise, forecasts),
                               rtol=1e-4, atol=1e-5)


def test_conditions_that_a_loop_does_not_take_are_refused():
    trajectory, gated = Trajectory(4, 3), compile_gated()
    forecasts = Forecasts(4, 2, trajectory.D)
    tables = forecasts.decision_tables()._replace(condition=torch.zeros(4, 8))
    forecasts.decision_tables = lambda: tables
    with pytest.raises(ValueError, match="adds to the steps' conditions, which this trajectory's loop does not take"):
        gated(trajectory, torch.randn(trajectory.shape), forecasts)
    assert gated.graphs == 0


def test_the_rule_of_change_is_refused():
    trajectory = Trajectory(4, 3)
    gated = compile_gated("change")
    with pytest.raises(ValueError, match="a forecast of the trunk follows its schedule"):
        gated.load(Forecasts(4, 2, trajectory.D))

"""Forecasts of the trunk on DiT and PixArt, against the plain diffusers model with a hook before its final norm."""

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler

from harmonica_dit import disable_cache, enable_cache, summary
from harmonica_dit.flops import Flops
from harmonica_dit.forecaster import TrunkForecaster, taylor
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.sample import make_scheduler
from harmonica_dit.sample.schedulers import config_of
from harmonica_dit.schedule import Schedule
from support.pipes import make_pipe, names_of, run
from support.tolerance import assert_close

COMPUTED = [True, False, True, False, False, True]


def trunk_schedule(transformer, forecaster=None, **made_for):
    names = names_of(transformer)
    compute = torch.tensor(COMPUTED)[:, None].repeat(1, len(names))
    return Schedule(compute, names, Flops((1.0,) * len(names), 1.0), **made_for,
                    forecaster=forecaster or taylor(COMPUTED, 1))


def random_forecaster(width, seed=0):
    """With tokens' weights, corrections and conditions."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: 0.3 * torch.randn(*shape, generator=generator)
    return TrunkForecaster(draw(6, 2, width) + torch.tensor([1.0, 0.0])[:, None], draw(6, 2, width), draw(6, width),
                           draw(6, width))


class TrunkHook:
    """Computes every step on the plain model and replaces what enters the final norm by the forecaster's definition."""

    def __init__(self, transformer, forecaster):
        self.step, self.kept, self.forecaster = -1, [], forecaster
        self.handles = [transformer.pos_embed.register_forward_hook(self.embed),
                        transformer.norm_out.register_forward_pre_hook(self.norm)]
        embedders = [transformer.adaln_single.emb] if hasattr(transformer, "adaln_single") else [
            block.norm1.emb for block in transformer.transformer_blocks]
        if forecaster.condition is not None:
            self.handles += [embedder.register_forward_hook(self.condition) for embedder in embedders]

    def condition(self, module, args, output):
        return output + self.forecaster.condition[self.step]

    def embed(self, module, args, output):
        self.step, self.tokens = self.step + 1, output

    def norm(self, module, args):
        state, s, f = args[0], self.step, self.forecaster
        tables = [None if t is None else t[s] for t in (f.states, f.tokens, f.own)]
        w, v, a = tables
        if COMPUTED[s]:
            h = state if a is None else state + a * state
            for i, (c, _) in enumerate(self.kept):
                h = h + w[i] * (c - state)
            self.kept = [(state, self.tokens), *self.kept][: f.history]
            return (h,)
        h = sum(w[i] * c for i, (c, _) in enumerate(self.kept))
        if v is not None:
            h = h + sum(v[i] * (self.tokens - e) for i, (_, e) in enumerate(self.kept))
        return (h,)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("learned", [False, True])
@torch.no_grad()
def test_forwards_equal_the_plain_models_under_the_hook(small, learned):
    model, inputs = small
    adapter = adapt(model)
    schedule = trunk_schedule(model, random_forecaster(model.inner_dim) if learned else None)
    times = [900.0, 700.0, 500.0, 300.0, 200.0, 0.0]
    steps = [inputs | dict(timestep=torch.full_like(inputs["timestep"], int(t)),
                           hidden_states=inputs["hidden_states"] * (1 + 0.1 * s)) for s, t in enumerate(times)]
    with TrunkHook(model, schedule.forecaster):
        expected = [model(**step).sample for step in steps]
    condition = schedule.condition_on(torch.device("cpu"))
    assert (condition is not None) == learned
    plain = [{} if condition is None else dict(condition=row) for row in (condition if learned else times)]
    for hoisted in (plain, adapter.hoist(schedule.rows, times, **inputs, condition=condition)):
        cache = schedule.new_cache()
        for s, (step, more) in enumerate(zip(steps, hoisted, strict=True)):
            found = adapter(**step, **more, row=schedule.rows[s], cache=cache,
                            forecast_weights=schedule.forecast_weights[s]).sample
            assert_close(found, expected[s])


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_a_forecast_step_runs_no_block(kind):
    pipe = make_pipe(kind)
    schedule = trunk_schedule(pipe.transformer)
    calls, queries = [], [block.attn1.to_q for block in pipe.transformer.transformer_blocks]
    for linear in queries:
        linear.register_forward_hook(lambda *_: calls.append(1))
    enable_cache(pipe, schedule)
    run(pipe, steps=6)
    assert len(calls) == sum(COMPUTED) * len(queries)


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_a_pipeline_gives_what_the_hook_gives(kind):
    pipe = make_pipe(kind)
    schedule = trunk_schedule(pipe.transformer, random_forecaster(pipe.transformer.inner_dim))
    with TrunkHook(pipe.transformer, schedule.forecaster):
        expected = run(pipe, steps=6)
    enable_cache(pipe, schedule)
    assert_close(run(pipe, steps=6), expected)
    assert_close(run(pipe, steps=6), expected)  # the second call starts afresh
    disable_cache(pipe)


def test_other_timesteps_are_refused():
    pipe = make_pipe("dit")
    forecaster = random_forecaster(pipe.transformer.inner_dim)
    enable_cache(pipe, trunk_schedule(pipe.transformer, forecaster, timesteps=(900, 700, 500, 300, 200, 0)))
    with pytest.raises(ValueError, match="the forecaster's weights belong to"):
        run(pipe, steps=6)
    with pytest.raises(ValueError, match="this call has 5 steps, the schedule is for T = 6"):
        run(pipe, steps=5)


@pytest.mark.parametrize("change, message", [
    (dict(scheduler="ddim"), "its forecaster is for the scheduler 'ddim', this one is 'DDIMScheduler'"),
    (dict(states=torch.zeros(6, 2, 5)), "its forecaster has states of width 5, the model has 24"),
    (dict(condition=torch.zeros(6, 5)), "its forecaster has condition of width 5, the model has 24")])
def test_a_forecaster_of_another_scheduler_or_width_is_refused(change, message):
    pipe = make_pipe("dit")
    assert pipe.transformer.inner_dim == 24
    made_for = {name: change.pop(name) for name in ("scheduler",) if name in change}
    forecaster = TrunkForecaster(**dict(states=torch.zeros(6, 2, 24)) | change)
    with pytest.raises(ValueError, match=message):
        enable_cache(pipe, trunk_schedule(pipe.transformer, forecaster, **made_for))
    enable_cache(pipe, trunk_schedule(pipe.transformer, scheduler="DDIMScheduler"))
    disable_cache(pipe)


def test_a_scheduler_put_in_later_is_looked_at_too():
    """Another class, or other settings, at the same timesteps; the first fits again."""
    pipe = make_pipe("dit")
    own = pipe.scheduler
    dpm = DPMSolverMultistepScheduler.from_config(own.config, solver_order=3)
    schedule = trunk_schedule(pipe.transformer, scheduler="DPMSolverMultistepScheduler",
                              scheduler_config=config_of(dpm))
    pipe.scheduler = dpm
    enable_cache(pipe, schedule)
    first = run(pipe, steps=6)
    for other, message in ((own, "this one is 'DDIMScheduler'"),
                           (DPMSolverMultistepScheduler.from_config(own.config), "this one has solver_order=2")):
        pipe.scheduler = other
        with pytest.raises(ValueError, match=message):
            run(pipe, steps=6)
    pipe.scheduler = dpm
    assert torch.equal(run(pipe, steps=6), first)
    disable_cache(pipe)
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(own.config, variance_type="learned_range")  # as PixArt's
    sampled_with = config_of(make_scheduler(pipe.scheduler, 6))
    enable_cache(pipe, trunk_schedule(pipe.transformer, scheduler="DPMSolverMultistepScheduler",
                                      scheduler_config=sampled_with))
    disable_cache(pipe)


def test_whether_a_loops_scheduler_fits_is_not_seen():
    transformer = make_pipe("dit").transformer
    schedule = trunk_schedule(transformer, scheduler="DDIMScheduler")
    with pytest.warns(UserWarning, match="for the scheduler 'DDIMScheduler'; whether this loop steps by that one"):
        enable_cache(transformer, schedule, timesteps=[900.0, 700.0, 500.0, 300.0, 200.0, 0.0])
    disable_cache(transformer)


@pytest.mark.parametrize("kind", ["dit", "sigma"])
def test_the_generic_path_forecasts_the_trunk_alike(kind):
    """It is taken where the blocks are compiled; a forecaster that weighs the tokens cannot be followed there."""
    pipe = make_pipe(kind)
    schedule = trunk_schedule(pipe.transformer)
    with TrunkHook(pipe.transformer, schedule.forecaster):
        expected = run(pipe, steps=6)
    for block in pipe.transformer.transformer_blocks:
        block.compile(backend="eager")
    enable_cache(pipe, schedule)
    assert_close(run(pipe, steps=6), expected)
    assert summary(pipe).path == "generic"
    assert summary(pipe).left_out["the fused path"].startswith("transformer_blocks.0: has been compiled")
    with pytest.raises(ValueError, match="its forecaster was learned for a model that runs branch by branch"):
        enable_cache(pipe, trunk_schedule(pipe.transformer, random_forecaster(pipe.transformer.inner_dim)))

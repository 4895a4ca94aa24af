"""`enable_cache` with diffusers' schedulers: one evaluation a step is cached rightly, several are refused."""

import copy
import pickle

import diffusers
import pytest
import torch

import harmonica_dit
from support.enable_checks import steps_of
from support.own_loops import OwnLoop, make_own
from support.pipes import LINEAR, HookedCache, make_pipe, random_schedule, run, small_dit
from support.tolerance import assert_close

# some schedulers do with tensors what NumPy 2 will not take
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

STEPS = 7
ONE = ("DDIMScheduler", "DDPMScheduler", "DEISMultistepScheduler", "DPMSolverMultistepScheduler",
       "DPMSolverSinglestepScheduler", "EDMDPMSolverMultistepScheduler", "EDMEulerScheduler",
       "EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "IPNDMScheduler", "LCMScheduler",
       "SASolverScheduler", "TCDScheduler", "UniPCMultistepScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
SEVERAL = {"HeunDiscreteScheduler": {}, "KDPM2DiscreteScheduler": {}, "KDPM2AncestralDiscreteScheduler": {},
           "FlowMatchHeunDiscreteScheduler": {}, "PNDMScheduler": {},
           "PNDMScheduler without Runge-Kutta": dict(skip_prk_steps=True)}


def make_scheduler(name, **settings):
    settings |= dict(solver_order=1, lower_order_final=True) if name == "DPMSolverSinglestepScheduler" else {}
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("name", ONE)
def test_schedulers_of_one_evaluation_a_step(kind, name):
    """As hooks would; every step of the loop is one of the schedule, and the class is put back."""
    pipe = make_pipe(kind)
    pipe.scheduler = scheduler = make_scheduler(name)
    schedule = random_schedule(pipe.transformer, STEPS, timesteps=steps_of(scheduler, STEPS))

    def seeded():
        torch.manual_seed(0)  # for those that draw noise
        return run(pipe, steps=STEPS)

    with HookedCache(pipe.transformer, schedule):
        expected = seeded()
    harmonica_dit.enable_cache(pipe, schedule)
    found = seeded()
    assert_close(found, expected, 1e-4)
    stream, = harmonica_dit.summary(pipe).streams
    assert stream.steps == STEPS and not stream.fallbacks
    assert type(scheduler) is getattr(diffusers, name)


@pytest.mark.parametrize("name", FLOW)
def test_flow_matching_schedulers(name):
    pipe = make_own(OwnLoop, make_scheduler(name))
    harmonica_dit.enable_cache(pipe, 1.7)
    pipe()
    assert [(stream.steps, dict(stream.fallbacks)) for stream in harmonica_dit.summary(pipe).streams] == [(8, {})] * 2


@pytest.mark.parametrize("kind", ["dit", "sigma"])
@pytest.mark.parametrize("name", SEVERAL)
def test_schedulers_of_several_evaluations_are_refused_before_denoising(kind, name):
    """By what they say, or by timesteps that are repeated, of which their loops have more than steps."""
    pipe = make_pipe(kind)
    pipe.scheduler = make_scheduler(name.split()[0], **SEVERAL[name])
    harmonica_dit.enable_cache(pipe, 1.5)
    calls = []
    pipe.transformer.transformer_blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"pipe.scheduler: {name.split()[0]} takes [0-9]+ evaluations .*use a "
                                         r"scheduler of one a step, or harmonica_dit.disable_cache\(pipe\)"):
        run(pipe, steps=STEPS)
    assert not calls and type(pipe.scheduler).__name__ == name.split()[0]
    harmonica_dit.disable_cache(pipe)
    if "Flow" not in name:
        run(pipe, steps=STEPS)


def test_rounded_timesteps_may_be_equal():
    """The same number twice, at different noise."""
    pipe = make_pipe("sigma")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(**LINEAR, use_exponential_sigmas=True)
    assert len(set(steps_of(pipe.scheduler, 50))) < 50
    harmonica_dit.enable_cache(pipe, 1.7)
    run(pipe, steps=50)
    stream, = harmonica_dit.summary(pipe).streams
    assert stream.steps == 50 and not stream.fallbacks


def test_a_list_with_the_end_of_the_last_step():
    """As SCM's: one timestep more than steps; the schedule is for the others."""
    class WithEnd(diffusers.FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, steps, **settings):
            super().set_timesteps(steps, **settings)
            self.timesteps = torch.cat([self.timesteps, torch.zeros(1)])

    class AllButTheEnd(OwnLoop):
        def steps(self):
            with self.progress_bar(total=8):
                return list(self.scheduler.timesteps[:-1])

    pipe = make_own(AllButTheEnd, WithEnd(shift=3.0))
    adapter = harmonica_dit.pipelines.plans.GenericAdapter(pipe.transformer)
    K = len(adapter.branch_names)
    schedule = harmonica_dit.Schedule((torch.arange(8) % 2 == 0)[:, None].repeat(1, K), adapter.branch_names,
                                      harmonica_dit.flops.Flops((1.0,) * K, 1.0),
                                      timesteps=steps_of(pipe.scheduler, 8)[:-1])
    harmonica_dit.enable_cache(pipe, schedule)
    pipe()  # without a warning of other timesteps
    assert [stream.steps for stream in harmonica_dit.summary(pipe).streams] == [8, 8]


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_that_is_made_during_a_call(copied):
    """Is of the scheduler's own class, and its steps are not the pipeline's."""
    class Copies(OwnLoop):
        def advance(self, output, t, x):
            other = copied(self.scheduler)
            assert type(other) is diffusers.FlowMatchEulerDiscreteScheduler
            other.step(output, t, x)
            return super().advance(output, t, x)

    pipe = make_own(Copies)
    harmonica_dit.enable_cache(pipe, 1.7)
    pipe()
    assert [(stream.steps, dict(stream.fallbacks)) for stream in harmonica_dit.summary(pipe).streams] == [(8, {})] * 2


def test_one_scheduler_for_two_pipelines():
    """By turns, and one inside the other's loop: the steps of each are its own."""
    pipe = make_own(OwnLoop, diffusers.DDIMScheduler(clip_sample=False))  # which keeps no state
    other = make_own(OwnLoop, pipe.scheduler)

    class Nests(OwnLoop):
        def predict(self, x, t, i):
            if i == 3:
                self.inner = self.options["other"](seed=1)
                self.scheduler.set_timesteps(8)
            return super().predict(x, t, i)

    nests = make_own(Nests, pipe.scheduler)
    for one in (pipe, other, nests):
        harmonica_dit.enable_cache(one, 1.7)
    expected, inner = pipe(), other(seed=1)
    assert torch.equal(pipe(), expected)
    nests(other=other)
    assert torch.equal(nests.inner, inner)


def test_pipelines_of_their_own_are_not_given_what_is_computed_ahead():
    """DiT's modulations are, for diffusers' own loop passes the scheduler's timesteps on; others may not."""
    class Halves(diffusers.DiTPipeline):
        @torch.no_grad()
        def __call__(self, steps=6):
            draw = torch.Generator().manual_seed(0)
            x = torch.randn(2, 4, 8, 8, generator=draw)
            self.scheduler.set_timesteps(steps)
            for t in self.progress_bar(self.scheduler.timesteps):
                output = self.transformer(x, timestep=(t // 2).expand(2), class_labels=torch.tensor([3, 7])).sample
                x = self.scheduler.step(output[:, :4], t, x).prev_sample
            return x

    made = make_pipe("dit", transformer=small_dit())
    pipe = Halves(**made.components)
    pipe.set_progress_bar_config(disable=True)
    schedule = random_schedule(pipe.transformer)
    with HookedCache(pipe.transformer, schedule):
        expected = pipe()
    harmonica_dit.enable_cache(pipe, schedule)
    assert_close(pipe(), expected)
    handle = made.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | dict(timestep=kwargs["timestep"] // 2)), with_kwargs=True)
    with HookedCache(made.transformer, schedule):
        expected = run(made)
    harmonica_dit.enable_cache(made, schedule)
    assert_close(run(made), expected)
    handle.remove()


def test_a_scheduler_that_cannot_be_listened_to():
    class Nothing:
        order = 1

    pipe = make_own()
    pipe.scheduler = Nothing()
    with pytest.raises(TypeError, match="target: got OwnLoop, expected .* with a transformer and a scheduler"):
        harmonica_dit.enable_cache(pipe, 1.7)


def test_timesteps_that_go_back_are_not_reused_in_silence():
    """A loop that adds noise again and goes on: only the timesteps tell, which are not read while it runs."""
    class Restarts(OwnLoop):
        def steps(self):
            times = list(self.scheduler.timesteps)
            if self.options.get("set"):
                yield from times[:5]
                self.scheduler.set_timesteps(8)
                yield from times[2:]
            else:
                yield from times[:5] + times[2:]

    pipe = make_own(Restarts, diffusers.DDIMScheduler(clip_sample=False))
    harmonica_dit.enable_cache(pipe, 1.7)
    with pytest.warns(UserWarning, match="its timesteps went back in this call.*set the scheduler's timesteps where"):
        pipe()
    pipe(set=True)
    pipe = make_own(OwnLoop, diffusers.DDIMInverseScheduler(clip_sample=False))  # only rise
    harmonica_dit.enable_cache(pipe, 1.7)
    pipe()

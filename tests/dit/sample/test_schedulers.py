"""Every sampler: trajectories against plain loops over diffusers' schedulers, forks, λ and training."""

import json
import re
import sys

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SASolverScheduler,
)
from diffusers.utils import DummyObject
from diffusers.utils.torch_utils import randn_tensor

import harmonica_kernels as hk
from harmonica_dit.flops import count_flops
from harmonica_dit.models import DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import ReferenceDDIM, Trajectory, image_noise, make_scheduler
from harmonica_dit.sample.schedulers import config_of, from_record, steps_of
from harmonica_dit.train import train_router
from harmonica_dit.train.importance import measure_importance
from harmonica_dit.validate import check_scheduler_config

BETAS = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
T = 5
# what a user asks for, and the same scheduler made by hand
SCHEDULERS = {
    "DDIM": ("DDIMScheduler", lambda: DDIMScheduler(**BETAS, clip_sample=False)),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", lambda: DPMSolverMultistepScheduler(**BETAS)),
    "SA-Solver": ("SASolverScheduler", lambda: SASolverScheduler(**BETAS)),
    "SDE-DPM-Solver++": (DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++"),
                         lambda: DPMSolverMultistepScheduler(**BETAS, algorithm_type="sde-dpmsolver++")),
    "DDPM": ("DDPMScheduler", lambda: DDPMScheduler(**BETAS, clip_sample=False)),
    "IDDPM": ("iddpm", lambda: DDPMScheduler(**BETAS, clip_sample=False, variance_type="learned_range",
                                             timestep_spacing="linspace")),
    "flow": (FlowMatchEulerDiscreteScheduler(shift=3.0), lambda: FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "stochastic flow": (FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
                        lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)),
}
STOCHASTIC = {"SA-Solver", "SDE-DPM-Solver++", "DDPM", "IDDPM", "stochastic flow"}
every_scheduler = pytest.mark.parametrize("name", SCHEDULERS)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DiT(8, 4, 4, 16, 2, 2, num_classes=4, name="tiny").eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.15)
    return net


def trajectory_of(net, name, seed=1):
    return Trajectory(net, torch.tensor([0, 3]), steps=T, scheduler=SCHEDULERS[name][0], seed=seed)


def walk(trajectory, x, first=0):
    with torch.no_grad():
        for s in range(first, T):
            x = trajectory.advance(trajectory.predict(x, s), s, x)
    return x


@every_scheduler
def test_a_trajectory_is_the_plain_loop(net, name):
    trajectory, scheduler = trajectory_of(net, name), SCHEDULERS[name][1]()
    scheduler.set_timesteps(T)
    assert trajectory.timesteps == scheduler.timesteps.tolist()
    generators = [torch.Generator().manual_seed(int(np.random.SeedSequence((1, i, 1)).generate_state(1)[0]))
                  for i in range(2)]
    noise = image_noise(1, 0, 2, net.sample_shape)
    x, y, none = noise.clone(), torch.tensor([0, 3]), torch.tensor([4, 4])
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = net(x, t.expand(2), y), net(x, t.expand(2), none)
            output = conditional.clone()
            output[:, :3] = unconditional[:, :3] + 1.5 * (conditional - unconditional)[:, :3]
            output = output if name == "IDDPM" else output[:, :4]
            x = scheduler.step(output, t, x, **({} if name == "flow" else dict(generator=generators))).prev_sample
    torch.testing.assert_close(walk(trajectory, trajectory.start(noise)), x, rtol=1e-4, atol=1e-4)
    images = [walk(t, t.start(noise)) for t in (trajectory_of(net, name, seed) for seed in (1, 2))]
    assert torch.equal(*images) == (name not in STOCHASTIC)


def test_iddpm_is_the_references_respaced_diffusion(net):
    """p_sample of improved diffusion in float64: betas of the timesteps kept, log-variance between its two bounds."""
    trajectory = trajectory_of(net, "IDDPM")
    times = [round(i * 999 / (T - 1)) for i in range(T)]
    assert trajectory.timesteps == times[::-1]
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[times]
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    posterior = beta * (1 - before) / (1 - abar)
    generators = [g.clone_state() for g in trajectory._generators]
    x = trajectory.start(image_noise(1, 0, 2, net.sample_shape))
    for s, i in enumerate(reversed(range(T))):
        with torch.no_grad():
            output = trajectory.predict(x, s)
        eps, v = (part.double().numpy() for part in output.chunk(2, 1))
        x0 = (x.double().numpy() - np.sqrt(1 - abar[i]) * eps) / np.sqrt(abar[i])
        mean = (np.sqrt(before[i]) * beta[i] * x0
                + np.sqrt(1 - beta[i]) * (1 - before[i]) * x.double().numpy()) / (1 - abar[i])
        x = trajectory.advance(output, s, x)
        if i:
            low, high = np.log(posterior[i]), np.log(beta[i])
            noise = randn_tensor(x.shape, generator=generators).double().numpy()
            mean = mean + np.exp(0.5 * (low + (v + 1) / 2 * (high - low))) * noise
        np.testing.assert_allclose(x.numpy(), mean, rtol=2e-3, atol=2e-3)


@every_scheduler
@pytest.mark.parametrize("at", [1, 3])
def test_a_fork_goes_the_same_way_by_itself(net, name, at):
    """Multistep history and random state are the fork's own, and neither disturbs the other."""
    main = trajectory_of(net, name)
    x = main.start(image_noise(1, 0, 2, net.sample_shape))
    with torch.no_grad():
        for s in range(at):
            x = main.advance(main.predict(x, s), s, x)
    fork = main.fork()
    there = walk(fork, x, at)
    assert torch.equal(walk(main, x, at), there)
    whole = trajectory_of(net, name)
    assert torch.equal(walk(whole, whole.start(image_noise(1, 0, 2, net.sample_shape))), there)


@every_scheduler
@torch.no_grad()
def test_importance_is_the_naive_one(net, name):
    """T² forwards that share nothing, with the same noise on the way; to the last bit."""
    logits = 2 * torch.randn(T, 4, generator=torch.Generator().manual_seed(1))
    router = Router(logits, net.branch_names, count_flops(net), tuple(range(T)), threshold=0.5)
    noise = image_noise(1, 0, 2, net.sample_shape)

    def image(routed):
        trajectory, cache = trajectory_of(net, name), hk.FeatureCache()
        x = trajectory.start(noise)
        for s in range(T):
            row = dict(row=router.scores()[s], threshold=0.5) if s in routed else {}
            x = trajectory.advance(trajectory.predict(x, s, cache=cache, **row), s, x)
        return x

    whole = image(range(1, T))
    naive = [(whole - image([i for i in range(1, T) if i != s])).square().mean() for s in range(1, T)]
    found = measure_importance(router, trajectory_of(net, name), noise)
    assert torch.equal(found, torch.stack([torch.tensor(0.0), *naive])) and (found[1:] > 0).all()


@every_scheduler
def test_a_router_trains(net, name, tmp_path):
    """Two trajectories; stopped after the first, the second ends with the same bits."""
    options = dict(steps=T, beta=1e-3, batch=2, lr=0.1, scheduler=SCHEDULERS[name][0], progress=False)
    router = train_router(net, trajectories=2, **options)
    assert router.timesteps == tuple(trajectory_of(net, name).timesteps)
    count = iter(range(T + T * (T - 1) // 2 + 3 * T))  # λ, and more than the first trajectory's forwards

    def interrupt(*_):
        if next(count, None) is None:
            raise KeyboardInterrupt

    handle = net.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="after 1 of 2"):
        train_router(net, trajectories=2, out=tmp_path, **options)
    handle.remove()
    resumed = train_router(net, trajectories=2, out=tmp_path, **options)
    assert all(torch.equal(a, b) for a, b in zip(router.logits, resumed.logits, strict=True))


def test_dynamic_shifting_follows_the_number_of_tokens(net):
    """At 16 pixels of patch 4 there are 16 tokens instead of 4; as diffusers' pipelines calculate μ."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    flow = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    larger = DiT(16, 4, 4, 16, 1, 2, num_classes=4)
    for model, tokens in ((net, 4), (larger, 16)):
        expected = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
        expected.set_timesteps(T, mu=calculate_shift(tokens))
        assert make_scheduler(flow, T, model).timesteps.tolist() == expected.timesteps.tolist()
    assert make_scheduler(flow, T, net).timesteps.tolist() != make_scheduler(flow, T, larger).timesteps.tolist()


class Own:
    """A denoiser as far as schedulers see it."""

    def __init__(self, scheduler):
        self.scheduler = scheduler


def test_a_name_takes_the_models_own_noise():
    own = Own(DPMSolverMultistepScheduler(beta_schedule="scaled_linear", beta_end=0.012, use_karras_sigmas=True))
    for name in ("DDPMScheduler", "SASolverScheduler", "DPMSolverMultistepScheduler"):
        expected = getattr(diffusers, name).from_config(own.scheduler.config)
        made = make_scheduler(name, T, own)
        expected.set_timesteps(T)
        assert torch.equal(made.alphas_cumprod, expected.alphas_cumprod)
        assert torch.equal(made.timesteps, expected.timesteps) and not made.config.get("clip_sample")
    assert type(make_scheduler(None, T, own)) is DPMSolverMultistepScheduler


def test_a_learned_variance_reaches_only_who_can_use_it(net):
    """Others would cut the output at channel 3, of latents that have four."""
    learned = DDPMScheduler(**BETAS, variance_type="learned_range", clip_sample=False)
    assert make_scheduler(learned, T).config.variance_type == "learned_range"
    solver = make_scheduler("DPMSolverMultistepScheduler", T, Own(learned))
    assert solver.config.variance_type is None
    trajectory = Trajectory(net, torch.tensor([0]), steps=T, scheduler=solver)
    assert walk(trajectory, torch.randn(1, 4, 8, 8)).isfinite().all()
    plain = DiT(8, 4, 4, 16, 1, 2, num_classes=4, learn_sigma=False, name="plain")
    trajectory = Trajectory(plain, torch.tensor([0]), steps=T, scheduler="iddpm")
    with pytest.raises(ValueError, match="scheduler: DDPMScheduler takes a learned variance, which plain"):
        walk(trajectory, torch.randn(1, 4, 8, 8))


def test_noise_and_velocity_are_not_mixed_up():
    flow = Own(FlowMatchEulerDiscreteScheduler())
    assert isinstance(make_scheduler("FlowMatchEulerDiscreteScheduler", T, flow), FlowMatchEulerDiscreteScheduler)
    for name in ("ddim", "iddpm", "DDPMScheduler"):
        with pytest.raises(ValueError, match=f"scheduler: {name} is for models that predict the noise"):
            make_scheduler(name, T, flow)
    with pytest.raises(ValueError, match="scheduler: FlowMatchEulerDiscreteScheduler is for .* the velocity"):
        make_scheduler("FlowMatchEulerDiscreteScheduler", T)


@pytest.mark.parametrize("name, calls, steps", [("ddim", 7, 7), ("HeunDiscreteScheduler", 7, 4),
                                                ("HeunDiscreteScheduler", 1, 1)])
def test_steps_of_a_number_of_calls(name, calls, steps):
    assert steps_of(calls, name) == steps and len(make_scheduler(name, steps).timesteps) == calls


def test_a_number_of_calls_that_no_steps_make_is_refused():
    with pytest.raises(ValueError, match="'HeunDiscreteScheduler' cannot call the model 6 times"):
        steps_of(6, "HeunDiscreteScheduler")


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDPMScheduler",
                                  "FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "SASolverScheduler"])
def test_a_scheduler_is_kept_in_a_file_by_name_and_settings(name):
    """All but diffusers' notes, through JSON and back."""
    own = getattr(diffusers, name)(num_train_timesteps=600)
    str(own)  # adds notes
    config = json.loads(json.dumps(config_of(own)))
    check_scheduler_config(name, config)
    made = from_record(name, config)
    assert type(made) is type(own) and config_of(made) == config
    assert config["num_train_timesteps"] == 600 and not any(key.startswith("_") for key in config)
    assert (from_record(name, None), from_record(None, None), config_of(ReferenceDDIM())) == (name, None, None)


@pytest.mark.parametrize("name, config, message", [
    ("nonsense", {}, f"'nonsense', which diffusers {re.escape(diffusers.__version__)} does not have"),
    ("SchedulerMixin", {}, "'SchedulerMixin', which diffusers "),
    ("DDIMScheduler", {"beta_schedule": "nonsense"}, "scheduler_config: DDIMScheduler does not take .*nonsense"),
    ("DPMSolverMultistepScheduler", {"num_train_timesteps": -1}, "scheduler_config: DPMSolver"),
    ("DPMSolverMultistepScheduler", {"beta_start": "a"}, "scheduler_config: DPMSolver"),
    ("DPMSolverSinglestepScheduler", {"solver_order": -1}, "scheduler_config"),  # these raise all kinds of errors
    ("DPMSolverSinglestepScheduler", {"num_train_timesteps": 0}, "scheduler_config"),
    ("CMStochasticIterativeScheduler", {"rho": 0}, "scheduler_config")])
def test_a_files_nonsense_is_no_scheduler(name, config, message):
    with pytest.raises(ValueError, match=message):
        from_record(name, config)


@pytest.mark.parametrize("name, config, steps, message", [
    ("DPMSolverMultistepScheduler", {"trained_betas": []}, T, "of 5 steps: array of sample points is empty"),
    ("EulerDiscreteScheduler", {"timestep_spacing": "nonsense"}, T, "of 5 steps: nonsense"),
    ("PNDMScheduler", {}, 1, "of 1 steps: ")])
def test_settings_that_have_no_such_trajectory(name, config, steps, message):
    """Only the timesteps show it; the error says whose they are."""
    with pytest.raises(ValueError, match=f"scheduler: {name} with its settings has no trajectory {message}"):
        make_scheduler(getattr(diffusers, name)(**config), steps)


@pytest.mark.parametrize("spacing, settings", [
    ("linspace", {}), ("trailing", dict(solver_order=3)), ("trailing", dict(final_sigmas_type="sigma_min"))])
def test_unipc_at_timesteps_of_ones_own(spacing, settings):
    """At those that it would take at another spacing, which diffusers' UniPC cannot be given, it steps as there."""
    theirs = diffusers.UniPCMultistepScheduler(**BETAS, timestep_spacing=spacing, **settings)
    theirs.set_timesteps(T)
    other = diffusers.UniPCMultistepScheduler(**BETAS, timestep_spacing="leading", **settings)
    ours = make_scheduler(other, T, timesteps=theirs.timesteps.tolist())
    x = y = torch.randn(2, 1, 4, 4)
    for t in theirs.timesteps:
        x, y = (one.step(torch.cos(z * t), t, z).prev_sample for one, z in ((theirs, x), (ours, y)))
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_timesteps_that_the_model_was_not_trained_at(name):
    few = getattr(diffusers, name)(num_train_timesteps=600)
    make_scheduler(few, 3, timesteps=[599, 300, 9])
    with pytest.raises(ValueError, match="timesteps: got .600, 300, 9., expected 3 whole .* from at most 599"):
        make_scheduler(few, 3, timesteps=[600, 300, 9])


def test_unipc_for_flows_takes_no_timesteps():
    flow = diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with pytest.raises(ValueError, match="UniPCMultistepScheduler chooses its own and takes none"):
        make_scheduler(flow, 3, timesteps=[999, 500, 20])


def test_a_missing_package_is_not_a_wrong_setting(monkeypatch):
    module = sys.modules[diffusers.DPMSolverMultistepScheduler.__module__]
    monkeypatch.setattr(module, "is_scipy_available", lambda: False)
    with pytest.raises(ImportError, match="scipy"):
        from_record("DPMSolverMultistepScheduler", {"use_beta_sigmas": True})

    class Absent(metaclass=DummyObject):  # as diffusers has it in place of a class
        _backends = ["torch", "torchsde"]

        def __init__(self):
            raise ImportError("Absent requires the torchsde library")

    monkeypatch.setattr(diffusers, "AbsentScheduler", Absent, raising=False)
    for call in (lambda: from_record("AbsentScheduler", {}), lambda: make_scheduler("AbsentScheduler", 3)):
        with pytest.raises(ImportError, match="torchsde"):
            call()

"""Routers and forecasters of pipelines that run by their own loops: trained, saved, enabled, called."""

from functools import cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import harmonica_dit
from harmonica_dit.forecaster import forecast_ratios, taylor
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_dit.router import Router
from harmonica_dit.sample import sample
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import forecaster, train_forecaster, train_router
from harmonica_dit.train.student import Student, student_step
from harmonica_dit.train.unrolled import LearnedForecaster, unroll
from support.many_pipes import PIPES

NAMES = ("flux", "sd3", "qwen", "wan", "z-image", "sana")  # two calls a step, one doubled batch; lists, videos
TRAINED = (*NAMES, "chroma", "flux2", "flux2-klein", "lumina2", "aura-flow", "hunyuan-dit", "cogview4", "prx",
           "hunyuan-video", "ltx", "cogvideox", "mochi", "latte")
ROUTER = dict(steps=3, target_speedup=1.3, trajectories=2, batch=2, progress=False)
FORECASTER = dict(steps=4, iterations=2, images=2, held_out=2, batch=2, progress=False)
LABELS = torch.tensor([0, 1])
# so few trajectories leave soft scores, and so few entries meet no target closely
pytestmark = pytest.mark.filterwarnings("ignore:soft_share", "ignore:target_speedup", "ignore:forecasts to order 0")


@cache
def pipe_of(name):
    return PIPES[name].pipe()


@cache
def net_of(name):
    return harmonica_dit.load(pipe_of(name), **PIPES[name].to_train_on())


def trajectory_of(name, **options):
    net = net_of(name)
    return Trajectory(net, LABELS, **dict(steps=4) | options), image_noise(1, 0, 2, net.sample_shape)


def labels_of(name):
    return LABELS if PIPES[name].batches else LABELS[:1]


def call(name, config, steps):
    """The latents of an ordinary call with a cache."""
    net, pipe, labels = net_of(name), pipe_of(name), labels_of(name)
    latents = image_noise(1, 0, len(labels), net.sample_shape)
    packed = "flux2" in name  # its call takes latents that are not, and gives images only
    if packed:
        latents = latents.mT.unflatten(2, (4, 6))
    harmonica_dit.enable_cache(pipe, config)
    try:
        made = pipe(**net.arguments(labels, steps) | dict(output_type="pt" if packed else "latent"), latents=latents)[0]
    finally:
        harmonica_dit.disable_cache(pipe)
    return 2 * made - 1 if packed else made


@pytest.mark.parametrize("name", TRAINED)
def test_a_router_is_trained_saved_enabled_and_called(name, tmp_path):
    """The latents are those of the trainer's own hard schedule, to the bit."""
    net = net_of(name)
    router = train_router(net, out=tmp_path, **ROUTER | dict(batch=len(labels_of(name))))
    schedule = Router.load(tmp_path / "router.safetensors").schedule()
    assert schedule.speedup >= 1.3 and 0 < schedule.cur and schedule.architecture == net.architecture
    assert router.guidance == net.guidance
    expected = sample(net, labels_of(name), schedule=schedule, seed=1)
    assert torch.equal(call(name, tmp_path / "router.safetensors", 3), expected)
    assert not torch.equal(sample(net, labels_of(name), steps=3, seed=1), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_a_forecaster_is_trained_saved_enabled_and_called(name, tmp_path):
    """On two of four steps, to the bit; and its weights are not those that it began with."""
    net, target = net_of(name), "accurate" if name in TRAINED[::2] else "uncached"
    train_forecaster(net, 1.4, target=target, out=tmp_path, lr=0.05,
                     **FORECASTER | dict(batch=len(labels_of(name))))
    schedule = Schedule.load(tmp_path / "forecast.safetensors")
    made = schedule.forecaster
    assert schedule.compute.all(1).tolist().count(True) < 4 and made.tokens is None and made.condition is None
    assert schedule.resolution == net.resolution and made.states.shape[-1] == net.width
    expected = sample(net, labels_of(name), schedule=schedule, seed=1)
    assert torch.equal(call(name, tmp_path / "forecast.safetensors", 4), expected)
    begun = taylor(schedule.compute[:, 0].tolist(), 1, adams=target == "accurate")
    assert made.own is not None and (made.states[:, :1] - begun.states[:, :1]).abs().max() > 1e-3


def test_a_forecaster_of_other_steps_timesteps_and_models_is_refused(tmp_path):
    made = train_forecaster(net_of("sd3"), 1.4, target="uncached", **FORECASTER)
    with pytest.raises(ValueError, match="5 steps, the schedule is for T = 4"):
        call("sd3", made, 5)
    with pytest.raises(ValueError, match="for branches of 'SD3Transformer2DModel' such as"):
        call("flux", made, 4)
    pipe = PIPES["sd3"].pipe()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match=r"with shift=1.0, this one has shift=3.0; .* FlowMatchEuler\w+.from_config"):
        harmonica_dit.enable_cache(pipe, made)


def test_a_trunk_of_another_width_and_one_that_cannot_be_reused(monkeypatch):
    """All channels are weighed alike where they may differ from tensor to tensor; the second is refused."""
    entry = PIPES["sana"]
    monkeypatch.setattr(GenericAdapter, "architecture", {"class": "SanaTransformer2DModel", "K": 6, "D": 17})
    net = harmonica_dit.load(entry.pipe(), **entry.to_train_on())
    made = train_forecaster(net, 1.4, target="uncached", **FORECASTER)
    assert made.forecaster.states.shape[-1] == net.width == 1 and made.forecaster.own.shape[-1] == 1
    pipe = entry.pipe()
    harmonica_dit.enable_cache(pipe, made)
    assert entry.call(pipe, steps=4).isfinite().all()
    net.adapter.trunk_size, net.adapter.trunk_left_out = None, "of something"
    with pytest.raises(ValueError, match="the trunk of this model cannot be reused: of something"):
        train_forecaster(net, 1.4, target="uncached", **FORECASTER)


class EulerInDouble(FlowMatchEulerDiscreteScheduler):
    """diffusers' casts every sample to float32."""

    def step(self, output, t, x, **options):
        s = self.timesteps.tolist().index(t.item())
        moved = x + (self.sigmas[s + 1] - self.sigmas[s]).double() * output
        return (moved,) if options.get("return_dict") is False else type("Moved", (), dict(prev_sample=moved))


@pytest.fixture(scope="module")
def exact():
    """A Flux in float64, guided by two calls."""
    entry = PIPES["flux"]
    pipe = entry.pipe().to(torch.float64)
    pipe.scheduler = EulerInDouble(use_dynamic_shifting=True)
    return harmonica_dit.load(pipe, **entry.to_train_on(dtype=torch.float64))


def learned_weights(net, compute, history=2):
    torch.manual_seed(0)
    made = LearnedForecaster(compute, taylor(compute, history - 1), net.width, True, entering=False).double()
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


def test_the_final_images_gradient_is_the_finite_difference(exact):
    """By every kind of weight, in a step that is forecast and in those that are corrected; recomputed or not."""
    learned = learned_weights(exact, [True, False, True, True])
    noise = image_noise(0, 0, 2, exact.sample_shape).double()
    saved = {True: 0, False: 0}

    def loss(checkpointing=True):
        return unroll(Trajectory(exact, LABELS, steps=4), noise, learned, checkpointing).square().mean()

    def counted(checkpointing):
        def pack(t):
            saved[checkpointing] += t.nbytes
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return loss(checkpointing)

    wanted = [p for p in learned.parameters() if p.requires_grad and p.numel()]
    assert len(wanted) == 3 + 3  # states of the steps after the first, own of the computed ones
    found, plain = (torch.autograd.grad(counted(again), wanted) for again in (True, False))
    for mine, theirs in zip(found, plain):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=0)
    assert saved[True] < 0.5 * saved[False]
    with torch.no_grad():
        for p, g in zip(wanted, found):
            direction = torch.randn_like(p)
            p += 1e-4 * direction
            after = loss()
            p -= 2e-4 * direction
            difference = (after - loss()) / 2e-4
            p += 1e-4 * direction
            # Flux turns queries and keys in float32
            torch.testing.assert_close((g * direction).sum(), difference, rtol=2e-4, atol=1e-8)


def test_the_gradient_of_sdt_reaches_its_own_row_alone(exact):
    """And is the finite difference of that step's error; the latents and the cache are constants to it."""
    K, noise = len(exact.branch_names), image_noise(0, 0, 2, exact.sample_shape).double()
    trajectory = Trajectory(exact, LABELS, steps=4)
    router = Router(torch.randn(4, K), exact.branch_names, exact.flops, tuple(trajectory.timesteps),
                    extrapolation=torch.ones(4, K), learn_extrapolation=True).double()
    with torch.no_grad():
        student = Student(router, trajectory, noise)
        for _ in range(2):
            student.advance(student.predict(router.score(student.s) if student.s else None))
        target, before = student.teacher(), trajectory.new_cache(router.history).copy_(student.cache)
        with torch.enable_grad():
            scores = router.score(2)
        student.learn(scores, target, torch.tensor(2.0), None)
    for rows in (router.logits, router.coefficients):
        assert [row.grad is not None for row in rows] == [False, True, False]  # of the steps 1, 2 and 3

    def step(r, e):
        cache = trajectory.new_cache(router.history).copy_(before)
        output, _, *gradients = student_step(trajectory.model, *trajectory.inputs(student.x, 2), target, r, e,
                                             torch.tensor(2.0), cache, router.threshold, None, True)
        return 2.0 * (output - target).square().mean(), gradients

    r, e = scores.detach().clone(), router.coefficients[1].detach() * forecast_ratios(student.decisions[:2])
    _, gradients = step(r, e)
    for values, gradient in zip((r, e), gradients, strict=True):
        direction = torch.randn_like(values)
        values += 1e-4 * direction
        after, _ = step(r, e)
        values -= 2e-4 * direction
        difference = (after - step(r, e)[0]) / 2e-4
        values += 1e-4 * direction
        torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-4, atol=1e-9)
        assert gradient.abs().max() > 1e-6


@pytest.mark.parametrize("name", ["flux", "z-image"])
def test_branches_that_the_backward_computes_again_give_the_same_router(name):
    """Single-stream blocks too, whose attention runs before the branch."""
    net, runs = net_of(name), {True: 0, False: 0}

    def train(checkpointing):
        def count(*_):
            runs[checkpointing] += 1

        linear = next(part for module, *_ in net.adapter.modules[1:] for part in module.modules()  # the first branch
                      if part is not module and isinstance(part, torch.nn.Linear))                 # gets no gradient
        handle = linear.register_forward_pre_hook(count)
        try:
            return train_router(net, checkpointing=checkpointing, **ROUTER).scores()
        finally:
            handle.remove()

    torch.testing.assert_close(train(True), train(False), rtol=1e-5, atol=1e-6)
    assert runs[True] > runs[False]


class Stop(Exception):
    pass


def stop_after(monkeypatch, owner, method, calls):
    left, real = iter(range(calls)), getattr(owner, method)

    def run(*args, **options):
        if next(left, None) is None:
            raise Stop
        return real(*args, **options)

    monkeypatch.setattr(owner, method, run)


def test_a_router_that_was_interrupted_ends_with_the_same_bits(tmp_path, monkeypatch):
    settings = ROUTER | dict(trajectories=3)
    expected = train_router(net_of("qwen"), **settings)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, Student, "learn", 4)  # two trajectories, two learned steps each
        train_router(net_of("qwen"), out=tmp_path, **settings)
    fresh = harmonica_dit.load(PIPES["qwen"].pipe(), **PIPES["qwen"].to_train_on())
    assert torch.equal(train_router(fresh, out=tmp_path, **settings).scores(), expected.scores())
    given = PIPES["qwen"].to_train_on()
    other = harmonica_dit.load(pipe_of("qwen"), prompts=given["prompts"], call=given["call"] | dict(true_cfg_scale=2.0))
    with pytest.raises(ValueError, match="of a training with call="):
        train_router(other, out=tmp_path, **settings)


def test_a_forecaster_that_was_interrupted_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(forecaster, "EVERY", 1)
    settings = FORECASTER | dict(iterations=3, target="uncached")
    expected = train_forecaster(net_of("sana"), 1.4, **settings)
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_after(patch, forecaster._Run, "_look", 2)
        train_forecaster(net_of("sana"), 1.4, out=tmp_path, **settings)
    found = train_forecaster(net_of("sana"), 1.4, out=tmp_path, **settings)
    assert torch.equal(found.forecaster.states, expected.forecaster.states)
    assert torch.equal(found.forecaster.own, expected.forecaster.own)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of Wan's norms, which stay in float32
def test_bfloat16():
    """Weights in it, and autocast to it, which the same denoiser can do without."""
    with torch.no_grad():
        exact, less = (trajectory.predict(noise, 0) for trajectory, noise in (
            trajectory_of("wan"), trajectory_of("wan", autocast="bfloat16")))
    assert 1e-4 < (exact - less).abs().max() / exact.abs().max() < 0.1 and less.dtype == torch.float32
    entry = PIPES["wan"]
    small = harmonica_dit.load(entry.pipe().to(torch.bfloat16), **entry.to_train_on(dtype=torch.bfloat16))
    for net, options in ((small, {}), (net_of("wan"), dict(autocast="bfloat16"))):
        assert train_router(net, **ROUTER, **options).scores().isfinite().all()
        found = train_forecaster(net, 1.4, target="uncached", **FORECASTER, **options)
        assert found.forecaster.states.isfinite().all()

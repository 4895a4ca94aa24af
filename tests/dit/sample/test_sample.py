"""Sampling: the reference's DDIM against its equations, guidance, seeds, and diffusers' schedulers."""

import numpy as np
import pytest
import torch

import harmonica_dit
import harmonica_kernels as hk
import harmonica_kernels.ops as ops
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import first_block
from harmonica_dit.models import DiT
from harmonica_dit.sample import ReferenceDDIM, Trajectory, denoise, image_noise, make_scheduler, sample
from harmonica_dit.schedule import Schedule
from support.cpu_recorder import CpuRecorder, Replay


def small(out_variance=False, channels=1):
    torch.manual_seed(0)
    net = DiT(8, 4, channels, 16, 2, 2, num_classes=4, learn_sigma=out_variance).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.15)
    return net


def test_timesteps_are_the_references():
    """Evenly spaced over 0..999 inclusive, each rounded: 999 → 946 → 894 → … → 0 at T = 20."""
    scheduler = make_scheduler("ddim", 20)
    assert scheduler.timesteps[:4].tolist() == [999, 946, 894, 841] and scheduler.timesteps[-1] == 0
    assert len(set(scheduler.timesteps.tolist())) == 20


@pytest.mark.parametrize("T", [1, 2, 7, 20, 50, 1000])
def test_ddim_equals_a_float64_transcription(T):
    """x' = √ᾱ'·(x - √(1-ᾱ)·ε)/√ᾱ + √(1-ᾱ')·ε along the list, ending at ᾱ' = 1; no clipping."""
    abar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    times = [999] if T == 1 else [round(i * 999 / (T - 1)) for i in range(T)][::-1]
    scheduler = make_scheduler("ddim", T)
    assert scheduler.timesteps.tolist() == times
    rng = np.random.default_rng(T)
    x = rng.standard_normal((3, 5)) * 4
    ours = torch.from_numpy(x)
    for s, t in enumerate(times):
        eps = np.tanh(x) + t / 1000
        a, b = abar[t], abar[times[s + 1]] if s + 1 < T else 1.0
        x = np.sqrt(b) * (x - np.sqrt(1 - a) * eps) / np.sqrt(a) + np.sqrt(1 - b) * eps
        ours = scheduler.step(torch.tanh(ours) + t / 1000, scheduler.timesteps[s], ours).prev_sample
    np.testing.assert_allclose(ours.numpy(), x, rtol=2e-4)


def test_diffusers_ddim_is_another_sampler():
    """The trap that ReferenceDDIM exists for: diffusers steps by a stride, not to the next timestep."""
    net, labels = small(), torch.arange(4)
    reference, strided = (sample(net, labels, steps=20, scheduler=s) for s in ("ddim", "DDIMScheduler"))
    assert (reference - strided).norm() / reference.norm() > 0.01


@pytest.mark.parametrize("scheduler", ["ddim", "DDIMScheduler", "DPMSolverMultistepScheduler", "DDPMScheduler",
                                       "EulerDiscreteScheduler", "PNDMScheduler", "SASolverScheduler"])
def test_batch_split_does_not_matter(scheduler):
    """A seed gives each image its own noise, at the start and on the way."""
    net, labels = small(), torch.tensor([0, 3, 1, 2, 2, 0, 1])
    whole = sample(net, labels, steps=6, scheduler=scheduler, batch=7, seed=3)
    for batch in (1, 3):
        torch.testing.assert_close(sample(net, labels, steps=6, scheduler=scheduler, batch=batch, seed=3), whole,
                                   rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(sample(net, labels[4:], steps=6, scheduler=scheduler, seed=3, first=4), whole[4:],
                               rtol=1e-3, atol=1e-3)
    assert (sample(net, labels, steps=6, scheduler=scheduler, seed=4) - whole).abs().max() > 0.01


def test_a_scheduler_instance_is_copied():
    mine = make_scheduler("DPMSolverMultistepScheduler", 3)
    before = mine.timesteps.clone()
    sample(small(), [0, 1], steps=5, scheduler=mine)
    assert torch.equal(mine.timesteps, before) and isinstance(make_scheduler(ReferenceDDIM(), 5), ReferenceDDIM)


def test_noise_is_each_images_own():
    a = image_noise(1, 0, 1000, (1, 4, 4))
    assert torch.equal(image_noise(1, 10, 5, (1, 4, 4)), a[10:15])
    assert len({tuple(row) for row in a.flatten(1).tolist()}) == 1000
    assert a.mean().abs() < 0.05 and (a.std() - 1).abs() < 0.05
    assert not torch.equal(image_noise(2, 0, 1000, (1, 4, 4)), a)


def test_guidance_channels():
    """Guided on the first c channels; the rest is the conditional output."""
    net = small(out_variance=True, channels=4)
    x, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 1, 2])
    for c in (None, 3, 8):
        t = Trajectory(net, labels, steps=4, guidance=2.5, guidance_channels=c)
        when = torch.full((3,), t.timesteps[1])
        conditional, unconditional = net(x, when, labels), net(x, when, torch.full((3,), 4))
        expected = unconditional + 2.5 * (conditional - unconditional)
        if c != 8:
            expected[:, 3:] = conditional[:, 3:]
        torch.testing.assert_close(t.predict(x, 1), expected, rtol=1e-4, atol=1e-4)
    plain = Trajectory(net, labels, steps=4, guidance=1.0)
    torch.testing.assert_close(plain.predict(x, 1), net(x, when, labels))


@pytest.mark.parametrize("guidance, channels, variance", [(1.5, 3, True), (4.0, 9, False), (1.0, None, True)])
def test_guidance_and_update_are_one_pass_where_there_is_a_kernel(monkeypatch, guidance, channels, variance):
    """The same images but for rounding; a schedule's rows pass through. From outputs in half precision too."""
    net, labels, calls = small(variance, channels=4), torch.tensor([0, 1, 2]), []
    schedule, noise = table(net, 6), image_noise(0, 0, 3, net.sample_shape)

    def trajectory(**options):
        return Trajectory(net, labels, steps=6, guidance=guidance, guidance_channels=channels, **options)

    def image(scheduler):
        with torch.no_grad():
            return denoise(trajectory(scheduler=scheduler), noise, schedule)

    schedulers = (None, "DPMSolverMultistepScheduler", "DDIMScheduler")
    expected = {scheduler: image(scheduler) for scheduler in schedulers}
    step = ops.guided_step
    monkeypatch.setattr(ops, "guided_step", lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs))
    for scheduler in schedulers:
        assert torch.equal(image(scheduler), expected[scheduler]) and not calls  # no kernel: as it was
    monkeypatch.setattr(ops, "FUSED", ("cpu",))
    for scheduler in schedulers:
        torch.testing.assert_close(image(scheduler), expected[scheduler], rtol=1e-4, atol=1e-4)
        assert len(calls) == 6  # only the reference's step is a·x + b·ε
    half = trajectory(autocast="bfloat16")
    with torch.no_grad():
        torch.testing.assert_close(half.step(noise, 2), half.advance(half.predict(noise, 2), 2, noise), rtol=1e-4,
                                   atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("executor", ["eager", "captured"])
def test_fused_on_a_gpu(monkeypatch, executor):
    """Bias and GELU, guidance and update: the same images as without these kernels, but for rounding."""
    net, labels = small(True, channels=4).cuda(), torch.arange(12) % 4
    fused = sample(net, labels, steps=6, batch=4, schedule=table(net, 6), executor=executor)
    monkeypatch.setattr(ops, "FUSED", ())
    plain = sample(net, labels, steps=6, batch=4, schedule=table(net, 6))
    assert not torch.equal(fused, plain)
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


def test_a_fork_goes_its_own_way():
    """Multistep history and random state are the fork's own."""
    net, labels = small(), torch.tensor([0, 1])
    for scheduler in ("DPMSolverMultistepScheduler", "DDPMScheduler"):
        main = Trajectory(net, labels, steps=6, scheduler=scheduler)
        x = main.start(image_noise(0, 0, 2, net.sample_shape))
        for s in range(3):
            x = main.advance(main.predict(x, s), s, x)
        fork, y = main.fork(), x
        for s in range(3, 6):
            y = fork.advance(fork.predict(y, s), s, y)
        for s in range(3, 6):
            x = main.advance(main.predict(x, s), s, x)
        assert torch.equal(x, y)


def table(net, T, seed=0, extrapolation=False):
    """A schedule with random rows."""
    compute = torch.rand(T, len(net.branches), generator=torch.Generator().manual_seed(seed)) < 0.5
    compute[0] = True
    return Schedule(compute, net.branch_names, count_flops(net), extrapolation=0.5 * torch.ones(compute.shape)
                    if extrapolation else None)


@pytest.mark.parametrize("scheduler", ["ddim", "DDPMScheduler"])
def test_executors_change_nothing_without_a_gpu(scheduler):
    """By name and kept over calls, to the last bit, schedulers that draw noise included."""
    net, labels = small(), torch.arange(7) % 4
    mine = hk.compile(denoise)
    for schedule in (None, table(net, 4)):
        options = dict(steps=4, schedule=schedule, scheduler=scheduler, batch=3, seed=5)
        eager = sample(net, labels, **options)
        for executor in ("eager", "captured", mine, mine):
            assert torch.equal(sample(net, labels, executor=executor, **options), eager)


@pytest.mark.parametrize("scheduler", ["ddim", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"])
def test_a_whole_trajectory_in_a_graph(monkeypatch, scheduler):
    """Recorded once and replayed for other labels and noise; another setting is another graph."""
    CpuRecorder.install(monkeypatch)
    net, other = small(channels=4, out_variance=True), small(channels=4, out_variance=True)
    schedules = [table(net, 5), table(net, 5, 1), table(net, 5, extrapolation=True)]
    settings = [dict(schedule=schedules[0]), dict(schedule=schedules[1]), dict(schedule=schedules[2]), dict(),
                dict(guidance=1), dict(guidance_channels=9), dict(steps=4), dict(net=other)]
    executor = hk.compile(denoise)
    for n, setting in enumerate(settings):
        setting = dict(net=net, steps=5, scheduler=scheduler) | setting
        for seed in range(3):
            labels = (torch.arange(3) + seed) % 4
            got = sample(labels=labels, seed=seed, executor=executor, **setting)
            assert torch.equal(got, sample(labels=labels, seed=seed, **setting))
        assert executor.graphs == n + 1
    sample(labels=torch.arange(10) % 4, batch=3, seed=5, executor=executor, **setting)
    assert executor.graphs == len(settings)  # three replays; the last batch has one label and ran as it is


def test_what_can_be_recorded_is_by_default(monkeypatch):
    """From three whole batches on; not where the scheduler draws noise, the schedule decides while it runs, or a hook
    would not be called."""
    CpuRecorder.install(monkeypatch)
    net, labels, called = small(), torch.arange(7) % 4, []
    for recorded, options in ((True, dict(batch=2)), (True, dict(batch=2, schedule=table(net, 4))),
                              (False, dict(batch=3)), (False, dict(batch=2, executor="eager")),
                              (False, dict(batch=2, scheduler="DDPMScheduler")),
                              (False, dict(batch=2, schedule=first_block(net, 4, threshold=0.1)))):
        CpuRecorder.log.clear()
        found = sample(net, labels, **dict(steps=4) | options)
        assert len(CpuRecorder.log) == recorded, options
        assert torch.equal(found, sample(net, labels, **dict(steps=4) | options | dict(executor="eager")))
    net.blocks[0].mlp.register_forward_hook(lambda *_: called.append(1))
    CpuRecorder.log.clear()
    sample(net, labels, steps=4, batch=2)
    assert not CpuRecorder.log and len(called) == 4 * 4


@pytest.mark.parametrize("scheduler", ["ddim", "UniPCMultistepScheduler"])  # one has a history
def test_a_graph_that_does_not_fit_is_not_needed(monkeypatch, scheduler):
    """Unless it was asked for."""
    CpuRecorder.install(monkeypatch)
    net, labels = small(), torch.arange(7) % 4
    expected = sample(net, labels, steps=4, batch=2, scheduler=scheduler, executor="eager")

    def no_memory(self, call=None, alone=None):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:  # at the third batch, of which two is the last that fits beside a graph
        patch.setattr(Replay, "replay", no_memory)
        assert torch.equal(sample(net, labels, steps=4, batch=2, scheduler=scheduler), expected)
        assert [kind for kind, _ in CpuRecorder.log] == ["new pool", "free"]
    monkeypatch.setattr(CpuRecorder, "record", no_memory)
    assert torch.equal(sample(net, labels, steps=4, batch=2, scheduler=scheduler), expected)
    with pytest.raises(torch.OutOfMemoryError):
        sample(net, labels, steps=4, batch=2, scheduler=scheduler, executor="captured")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scheduler", ["ddim", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_trajectory_on_a_gpu(scheduler, dtype):
    net = small(channels=4, out_variance=True).to("cuda", dtype)
    executor = hk.compile(denoise)
    for schedule in (None, table(net, 5), table(net, 5, extrapolation=True)):
        for seed in range(4):
            options = dict(labels=(torch.arange(3) + seed) % 4, steps=5, seed=seed, schedule=schedule,
                           scheduler=scheduler)
            assert torch.equal(sample(net, executor=executor, **options), sample(net, **options))
    assert executor.graphs == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_on_the_way_cannot_be_captured():
    net = small().cuda()
    with pytest.raises(RuntimeError, match='executor="eager"'):
        sample(net, [0, 1, 2], steps=3, scheduler="DDPMScheduler", batch=1, executor="captured")


@pytest.mark.parametrize("options, words", [
    (dict(executor="fast"), "executor: got 'fast'"), (dict(executor=torch.sin), "executor: got"),
    (dict(executor=hk.compile(torch.sin)), "executor: got"),
    (dict(labels=[4]), "labels: got 4"), (dict(labels=[-1]), "labels: got -1"), (dict(labels=[]), "labels"),
    (dict(labels=[0.5]), "labels"), (dict(labels=[[1]]), "labels"),
    (dict(steps=0), "steps: got 0"), (dict(steps=-3), "steps: got -3"), (dict(steps=1001), "steps"),
    (dict(steps=2.5), "steps"), (dict(batch=0), "batch"), (dict(seed=-1), "seed: got -1"),
    (dict(first=-2), "first: got -2"), (dict(guidance=float("nan")), "guidance"),
    (dict(guidance_channels=0), "guidance_channels"), (dict(scheduler="NoSuch"), "scheduler: got 'NoSuch'"),
    (dict(scheduler="DiTPipeline"), "scheduler"), (dict(scheduler=5), "scheduler: got int"),
    (dict(scheduler="FlowMatchEulerDiscreteScheduler"), "scheduler: FlowMatch"),
    (dict(labels=None), "labels: got None"), (dict(guidance="a"), "guidance: got 'a'"),
    (dict(schedule=3), "schedule: got int"),
])
def test_bad_input(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        sample(small(), **(dict(labels=[0], steps=3) | options))


def test_bundled_model_is_recognised():
    """Uncached DDIM-20 samples with guidance show the requested class; the shipped classifier says so."""
    from harmonica_dit.fashion.classifier import load_classifier

    labels = torch.arange(30) % 10
    images = harmonica_dit.sample(harmonica_dit.load("fashion-dit"), labels, steps=20, guidance=2.0)
    shown = load_classifier()(images.clamp(-1, 1)).argmax(1)
    assert (shown == labels).float().mean() >= 0.85

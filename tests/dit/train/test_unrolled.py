"""A trajectory whose forecasts are learned: its gradient, its memory, its loss, and what it becomes."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import layer_norm

import harmonica_kernels as hk
from harmonica_dit.forecaster import taylor
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.sample import denoise, sample
from harmonica_dit.sample.trajectory import Trajectory, image_noise
from harmonica_dit.schedule import Schedule
from harmonica_dit.train import train_forecaster
from harmonica_dit.train.own_features import feature_error
from harmonica_dit.train.unrolled import LearnedForecaster, unroll

SMALL = dict(steps=6, iterations=30, images=8, held_out=4, batch=4, progress=False, seed=1,
             perceptual=0.0)  # the features of a model that was not trained say nothing


def learned_weights(compute, width, history=2, noise=0.1):
    torch.manual_seed(0)
    made = LearnedForecaster(compute, taylor(compute, history - 1), width, correct=True)
    with torch.no_grad():
        for p in made.parameters():
            p += noise * torch.randn_like(p)
    return made


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_gradient_through_a_trajectory_is_the_finite_difference(net, guidance):
    """In float64, with forecast, corrected and first steps, and with guidance rows."""
    net, compute = net.double(), [True, False, True, False, False, True]
    learned = learned_weights(compute, net.width).double()
    noise = image_noise(0, 0, 2, net.sample_shape).double()

    def loss():
        trajectory = Trajectory(net, torch.tensor([0, 3]), steps=6, guidance=guidance)
        return unroll(trajectory, noise, learned).square().mean()

    parameters = [p for p in learned.parameters() if p.numel()]
    wanted = [p for p in parameters if p.requires_grad]
    found = torch.autograd.grad(loss(), wanted)
    with torch.no_grad():
        for p, g in zip(wanted, found):
            direction = torch.randn_like(p)
            p += 1e-5 * direction
            after = loss()
            p -= 2e-5 * direction
            difference = (after - loss()) / 2e-5
            p += 1e-5 * direction
            torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-5, atol=1e-9)
    net.float()


def test_what_is_frozen_samples_what_was_unrolled(net):
    compute = [True, False, False, True, False, True]
    learned = learned_weights(compute, net.width)
    schedule = trunk_forecast(net, 6, every=1)
    schedule = Schedule(torch.tensor(compute)[:, None].repeat(1, 4), net.branch_names, schedule.flops,
                        forecaster=learned.freeze(net.tokens * net.width, ""))
    noise = image_noise(5, 0, 3, net.sample_shape)
    labels = torch.tensor([1, 2, 3])
    with torch.no_grad():
        unrolled = unroll(Trajectory(net, labels, steps=6), noise, learned)
    sampled = sample(net, labels, schedule=schedule, seed=5)
    torch.testing.assert_close(sampled, unrolled, rtol=1e-3, atol=1e-3)  # modulations come in other batches
    for name in ("states", "tokens", "own", "condition"):
        without = replace(schedule.forecaster, **{name: torch.zeros_like(getattr(schedule.forecaster, name))})
        other = sample(net, labels, schedule=replace(schedule, forecaster=without), seed=5)
        assert (other - sampled).abs().max() > 0.01
    gated = hk.compile(denoise, mode="gated")
    assert_close = torch.testing.assert_close
    assert_close(sample(net, labels, schedule=schedule, seed=5, executor=gated), sampled, rtol=1e-3, atol=1e-3)
    assert_close(sample(net, labels, schedule=trunk_forecast(net, 6, every=2), seed=5, executor=gated),
                 sample(net, labels, schedule=trunk_forecast(net, 6, every=2), seed=5), rtol=1e-3, atol=1e-3)
    assert gated.graphs == 1


def test_the_error_in_the_models_own_features(net):
    """By hand, at the last timestep that is not 0 and with labels alone; its gradient; and its part in a training."""
    trajectory = Trajectory(net, torch.tensor([1, 3]), steps=6, guidance=3.0)
    assert trajectory.timesteps[-1] == 0
    images, targets = (torch.randn(2, *net.sample_shape, requires_grad=r) for r in (True, False))
    with torch.no_grad():
        assert feature_error(trajectory, targets, targets) == 0
    found = feature_error(trajectory, images, targets)
    errors, t = [], torch.full((2,), trajectory.timesteps[-2])
    with torch.no_grad():
        [mod] = net.modulations((net.t_embedder(t) + net.y_embedder(torch.tensor([1, 3])))[None], [None])
        a, b = net.embed(images), net.embed(targets)
        for k, branch in enumerate(net.branches):
            h, wanted = (layer_norm(x, (net.width,), eps=branch.eps) * (1 + mod.scale[k][:, None])
                         + mod.shift[k][:, None] for x in (a, b))
            errors.append((h - wanted).square().mean() / wanted.square().mean())
            a, b = (x + mod.gate[k][:, None] * branch.body(entered, None) for x, entered in ((a, h), (b, wanted)))
    torch.testing.assert_close(found, torch.stack(errors).mean())
    [gradient] = torch.autograd.grad(found, images)
    with torch.no_grad():
        ahead, behind = (feature_error(trajectory, images + d * gradient / gradient.norm(), targets)
                         for d in (1e-2, -1e-2))
    torch.testing.assert_close((ahead - behind) / 2e-2, gradient.norm(), rtol=1e-2, atol=0)
    plain, seen = (train_forecaster(net, 1.8, **SMALL | dict(iterations=2, perceptual=w)) for w in (0.0, 1.0))
    assert not torch.equal(plain.forecaster.own, seen.forecaster.own)


def test_checkpointing_changes_memory_and_no_bit(net):
    """What autograd saves between steps, beside the parameters: a step's activations, or a few tensors."""
    made, saved = [], []
    for checkpointing in (True, False):
        made.append(train_forecaster(net, 1.8, checkpointing=checkpointing, **SMALL | dict(iterations=4)))
        learned = learned_weights([True, False, False, True, False, True], net.width)
        noise = image_noise(0, 0, 2, net.sample_shape)
        saved.append({})

        def pack(t, sizes=saved[-1]):
            sizes[t.data_ptr()] = t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            unroll(Trajectory(net, torch.tensor([0, 3]), steps=6), noise, learned, checkpointing)
    for name in ("states", "tokens", "own", "condition"):
        assert torch.equal(*(getattr(one.forecaster, name) for one in made))
    assert sum(saved[0].values()) < 0.5 * sum(saved[1].values())


@pytest.mark.parametrize("seen", [True, False])
def test_the_trajectory_of_a_multistep_solver_is_seen_through(net, seen):
    """Its own memory of outputs too, which makes much of the gradient. The solver computes in float32."""
    compute = [True, False, True, False, True, True]
    learned = learned_weights(compute, net.width, noise=0.02)
    noise = image_noise(0, 0, 1, net.sample_shape)

    def loss():
        trajectory = Trajectory(net, torch.tensor([2]), steps=6, scheduler="DPMSolverMultistepScheduler")
        if not seen:
            step = trajectory.scheduler.step

            def forget(*args, **options):
                scheduler = trajectory.scheduler
                scheduler.model_outputs = [o if o is None else o.detach() for o in scheduler.model_outputs]
                return step(*args, **options)

            trajectory.scheduler.step = forget
        return unroll(trajectory, noise, learned).double().square().mean()

    p = learned.states[1]
    found = torch.autograd.grad(loss(), p)[0]
    with torch.no_grad():
        direction = found / found.norm()
        p += 1e-2 * direction
        after = loss()
        p -= 2e-2 * direction
        difference = (after - loss()) / 2e-2
    assert (abs((found * direction).sum() / difference - 1) < 0.01) == seen



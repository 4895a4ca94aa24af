"""One trajectory of step-wise denoising training."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_dit.train.frozen_model import freeze
from harmonica_dit.train.sdt import train_trajectory
from harmonica_dit.train.student import Student

COSTS = torch.tensor([0.5, 1.5, 0.5, 1.5])


def optimizer_of(router, lr=0.1):
    return torch.optim.AdamW([p for p in router.parameters() if p.requires_grad], lr, eps=1e-16, weight_decay=0)


def run(net, router, student, optimizer, beta=1e-3, **options):
    with freeze(net):
        return train_trajectory(router, student, optimizer, torch.ones(router.steps), COSTS, beta, **options)


class Recorder:
    """An optimiser that takes note of the router before and after each step."""

    def __init__(self, router, optimizer):
        self.router, self.optimizer, self.steps = router, optimizer, []

    def step(self):
        before = [row.detach().clone() for row in self.router.parameters()]
        self.optimizer.step()
        self.steps.append((before, [row.detach().clone() for row in self.router.parameters()]))

    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)


@pytest.mark.parametrize("learned", [False, True])
def test_an_update_moves_its_row_alone_in_spite_of_momentum(net, make_router, make_trajectory, noise, learned):
    router = make_router(coefficients=learned, learned=learned)
    recorder = Recorder(router, optimizer_of(router))
    for _ in range(2):  # in the second trajectory every row has momentum
        run(net, router, Student(router, make_trajectory(), noise), recorder)
    assert len(recorder.steps) == 8
    for i, (before, after) in enumerate(recorder.steps):
        moved = {j % 4 for j, (a, b) in enumerate(zip(before, after, strict=True)) if not torch.equal(a, b)}
        assert moved == {i % 4}


def test_the_student_drives_the_trajectory_with_its_output_from_before_the_update(net, make_router, make_trajectory,
                                                                                  noise):
    router = make_router()
    start = router.scores()
    student = Student(router, make_trajectory(), noise)
    run(net, router, student, optimizer_of(router, lr=1.0))
    assert not torch.equal(router.scores(), start)
    trajectory, cache = make_trajectory(), hk.FeatureCache()
    x = trajectory.start(noise)
    with torch.no_grad():
        for s in range(5):
            row = dict(row=start[s], threshold=router.threshold) if s else {}
            x = trajectory.advance(trajectory.predict(x, s, cache=cache, **row), s, x)
    torch.testing.assert_close(student.x, x, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(student.x, run_uncached(make_trajectory(), noise), rtol=1e-3)


def run_uncached(trajectory, noise):
    x = trajectory.start(noise)
    with torch.no_grad():
        for s in range(trajectory.steps):
            x = trajectory.advance(trajectory.predict(x, s), s, x)
    return x


def test_loss_and_gradient_are_those_of_the_paper(net, make_router, make_trajectory, noise):
    """Row 1's update, the first after the cache is filled, from plain autograd over the whole expression."""
    router, lam, beta = make_router(T=2), torch.tensor([0.0, 3.0]), 1e-3
    trajectory, cache = make_trajectory(2), hk.FeatureCache()
    logits = router.logits[0].detach().clone().requires_grad_()
    with torch.no_grad():
        x = trajectory.start(noise)
        x = trajectory.advance(trajectory.predict(x, 0, cache=cache), 0, x)
        target = trajectory.predict(x, 1)
    with freeze(net):
        r = logits.sigmoid()
        output = trajectory.predict(x, 1, row=r, cache=cache, threshold=router.threshold)
        loss = 3.0 * (output - target).square().mean() + beta * (COSTS * r).sum()
        loss.backward()

    optimizer = torch.optim.SGD(router.parameters(), lr=1.0)
    before = router.logits[0].detach().clone()
    with freeze(net):
        seen = train_trajectory(router, Student(router, make_trajectory(2), noise), optimizer, lam, COSTS, beta)
    torch.testing.assert_close(seen.losses[0], loss.detach())
    torch.testing.assert_close(before - router.logits[0].detach(), logits.grad, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(seen.errors[0], (output - target).square().mean().detach())


def test_only_the_chosen_channels_are_compared(net, make_router, make_trajectory, noise):
    every, noise_only = (run(net, router, Student(router, make_trajectory(), noise), optimizer_of(router), beta=None,
                             channels=channels)
                         for channels in (None, 1) for router in [make_router()])
    assert not torch.allclose(every.errors, noise_only.errors)


def test_without_beta_nothing_is_updated(net, make_router, make_trajectory, noise):
    router = make_router()
    before = router.scores()
    seen = run(net, router, Student(router, make_trajectory(), noise), optimizer_of(router), beta=None)
    assert torch.equal(router.scores(), before)
    assert all(p.grad is None for p in router.parameters())
    assert seen.values.shape == (4, 4) and (seen.values != 0).all()


def test_logits_stay_within_5(net, make_router, make_trajectory, noise):
    router = make_router()
    run(net, router, Student(router, make_trajectory(), noise), optimizer_of(router, lr=50.0))
    assert all(row.abs().max() == 5 for row in router.logits)


def test_learned_coefficients_get_gradient_where_two_outputs_are_held(net, make_router, make_trajectory, noise):
    router = make_router(T=4, coefficients=True, learned=True, threshold=0.0)  # everything is renewed
    before = [row.detach().clone() for row in router.coefficients]
    run(net, router, Student(router, make_trajectory(4), noise), optimizer_of(router))
    assert torch.equal(router.coefficients[0], before[0])  # step 1: one output held, nothing to forecast from
    assert all((new != old).all() for new, old in zip(router.coefficients[1:], before[1:], strict=True))


def test_forecasts_are_used(net, make_router, make_trajectory, noise):
    images = []
    for coefficients in (False, True):
        router = make_router(coefficients=coefficients)
        student = Student(router, make_trajectory(), noise)
        run(net, router, student, optimizer_of(router))
        images.append(student.x)
    assert not torch.allclose(*images, rtol=1e-4)


def test_a_frozen_model_asks_for_no_gradients_and_is_afterwards_what_it_was(net):
    wanted = [p.requires_grad for p in net.parameters()]
    assert any(wanted) and not net.training
    net.train()
    try:
        with freeze(net):
            assert not any(p.requires_grad for p in net.parameters()) and not any(m.training for m in net.modules())
        assert [p.requires_grad for p in net.parameters()] == wanted and all(m.training for m in net.modules())
    finally:
        net.eval()

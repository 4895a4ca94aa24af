"""Training: a trajectory of SDT, a refresh of λ, an iteration of a forecaster."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from bench.problems import Plain, random_dit
from bench.sdt_loops import THRESHOLD, Problem
from bench.sdt_models import Blend
from harmonica_dit.forecaster import taylor
from harmonica_dit.router import Router
from harmonica_dit.sample import Trajectory, denoise, image_noise
from harmonica_dit.train.importance import measure_importance
from harmonica_dit.train.unrolled import LearnedForecaster, unroll

from . import OURS, PLAIN, Candidate, Case

LOSSES = 1e-2  # of losses that are little more than the difference of two outputs
WITHOUT = "without checkpointing"


def problem(steps: int, depth: int | None, tiny: bool) -> Problem:
    sizes = dict(model="DiT-S/8", steps=3, depth=1) if tiny else dict(model="DiT-S/2", steps=steps, depth=depth)
    return Problem(images=1, dtype="float32", device="cpu", **sizes)


def sdt(steps: int, tiny: bool) -> Mapping[str, Candidate]:
    """A trajectory of T - 1 updates."""
    made = problem(steps, None, tiny)
    return {loop: Candidate(lambda loop=loop: torch.tensor(made.run(loop)), LOSSES)
            for loop in (PLAIN, "published", OURS)}


def refresh(steps: int, depth: int, tiny: bool) -> Mapping[str, Candidate]:
    """λ of the paper with soft rows. Plain is the definition: a whole trajectory for each s."""
    made = problem(steps, depth, tiny)

    def trajectory() -> Trajectory:
        return Trajectory(made.net, made.labels, steps=made.steps)

    def ours() -> Tensor:
        router = Router(made.logits, made.net.branch_names, made.flops, tuple(trajectory().timesteps),
                        threshold=THRESHOLD)
        return measure_importance(router, trajectory(), made.noise, cache=made.cache)

    @torch.no_grad()
    def plain() -> Tensor:
        final = image(made, trajectory())
        return torch.stack([(image(made, trajectory(), s) - final).square().mean() for s in range(made.steps)])

    return {PLAIN: Candidate(plain), OURS: Candidate(ours, LOSSES)}


def image(made: Problem, trajectory: Trajectory, computed: int = 0) -> Tensor:
    """The final image with the router's rows, but all computed at step 0 and at one more."""
    x, cache = made.noise, [None] * made.logits.shape[1]
    for s, r in enumerate(made.logits.sigmoid()):
        blend = Blend(cache) if s in (0, computed) else Blend(cache, r, (r > THRESHOLD).tolist())
        x = trajectory.advance(made.guided(trajectory, x, s, blend), s, x)
    return x


def forecaster(images: int, steps: int, tiny: bool) -> Mapping[str, Candidate]:
    """Forward and backward of a trajectory that computes every second step. Plain: the uncached one, forward alone."""
    images, steps = (1, 4) if tiny else (images, steps)
    net, config = random_dit("fashion-dit")
    labels, noise = torch.arange(images), image_noise(0, 0, images, net.sample_shape)
    compute = [s % 2 == 0 for s in range(steps)]
    learned = LearnedForecaster(compute, taylor(compute, 1), net.width, correct=True)
    parameters = [p for p in learned.parameters() if p.requires_grad and p.numel()]
    plain, ours = (partial(Trajectory, of, labels, steps=steps) for of in (Plain(net, torch.float32, config), net))

    def uncached() -> Tensor:
        return denoise(plain(), noise)

    wanted = uncached()

    def iteration(checkpointing: bool) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            loss = (unroll(ours(), noise, learned, checkpointing) - wanted).square().mean()
            return [loss.detach(), *torch.autograd.grad(loss, parameters)]
        return run

    return {PLAIN: Candidate(uncached), OURS: Candidate(iteration(True), like=None),
            WITHOUT: Candidate(iteration(False), like=OURS)}


CASES = [
    Case("SDT of DiT-S/2, a trajectory, T = 3, 1 image", (PLAIN, "published", OURS), partial(sdt, 3), 5),
    Case("λ refresh, DiT-S/2 of 4 blocks, T = 5, 1 image", (PLAIN, OURS), partial(refresh, 5, 4), 5),
    Case("forecaster of fashion-dit, an iteration, T = 20, 4 images", (PLAIN, OURS, WITHOUT),
         partial(forecaster, 4, 20), 7),
]

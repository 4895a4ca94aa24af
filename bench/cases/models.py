"""Whole models, and single steps of models of one block: plain, compiled, ours, cached and as the reference does it."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from bench.gpu.reference_way import ReferenceWay
from bench.problems import Plain, random_dit, random_weights
from bench.sdt_models import DITS, PIXART, build
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.models import CONFIGS
from harmonica_dit.sample import Trajectory, denoise, image_noise
from harmonica_dit.schedule import Schedule

from . import COMPILED, OURS, PLAIN, Candidate, Case, compile_each, shared_copy

STEP = (PLAIN, COMPILED, OURS, f"trunk forecast: {PLAIN}", f"trunk forecast: {OURS}")
WHOLE = (PLAIN, COMPILED, OURS, "FORA n=2: reference's way", f"FORA n=2: {OURS}",
         f"trunk n=2: {PLAIN}", f"trunk n=2: {OURS}")
ROUGH = {True: 2.0, False: 0.5}  # how far from the uncached what is cached may be, at tiny sizes and at the real ones
FORECAST = 3  # the step of a trajectory of five, of which the steps 0, 2 and 4 are computed


class PlainPixArt(nn.Module):
    """diffusers' own transformer of a `PipelineDenoiser`, whose weights it shares, behind the denoisers' signature."""

    def __init__(self, net):
        super().__init__()
        self.net, self.prompts = shared_copy(net.transformer), net.prompts
        for name in ("guidance", "guidance_channels", "scheduler", "sample_shape", "num_classes", "name"):
            setattr(self, name, getattr(net, name))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.net(x, timestep=t, added_cond_kwargs=dict(resolution=None, aspect_ratio=None), return_dict=False,
                        **self.prompts.conditions(y, x.dtype))[0]


class Kept(nn.Module):
    """In the blocks' place: gives a state that was made."""

    state: Tensor

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        return self.state


class WholeSteps(nn.Module):
    """Plain models by a schedule of whole steps: the state that leaves the blocks is kept, and forecast by Taylor's
    weights where a step is not computed. Finds the step by its timestep."""

    def __init__(self, plain_of: Callable[[], nn.Module], schedule: Schedule, timesteps: list[float]):
        super().__init__()
        self.computing, self.forecasting, self.kept = plain_of(), plain_of(), Kept()
        for name in ("guidance", "guidance_channels", "sample_shape", "num_classes", "name", "scheduler"):
            setattr(self, name, getattr(self.computing, name))
        blocks_of(self.computing)[-1].register_forward_hook(lambda module, args, z: self.states.appendleft(z))
        setattr(self.forecasting.net, blocks_name(self.forecasting), nn.ModuleList([self.kept]))
        self.states: deque[Tensor] = deque(maxlen=schedule.forecaster.history)
        self.rows = {t: (bool(row.all()), weights.squeeze(-1).tolist()) for t, row, weights in zip(
            timesteps, schedule.compute, schedule.forecaster.states, strict=True)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        computed, weights = self.rows[t[0].item()]
        if computed:
            return self.computing(x, t, y)
        self.kept.state = sum(w * z for w, z in zip(weights, self.states))
        return self.forecasting(x, t, y)


def blocks_name(plain: nn.Module) -> str:
    return "blocks" if isinstance(plain, Plain) else "transformer_blocks"


def blocks_of(plain: nn.Module) -> nn.ModuleList:
    return getattr(plain.net, blocks_name(plain))


def compiled(plain: nn.Module) -> nn.Module:
    compile_each(blocks_of(plain))
    return plain


def step(model: str, tiny: bool) -> Mapping[str, Candidate]:
    """One step with guidance, two rows, of a model of one block; no step shares anything with another."""
    name = "DiT-S/8" if tiny and model != PIXART else model
    net, _ = build(name, 1)
    config = None if model == PIXART else CONFIGS[name] | DITS | dict(depth=1)
    plain_of = partial(PlainPixArt, net) if config is None else partial(Plain, net, torch.float32, config)
    steps, x = 5, image_noise(0, 0, 1, net.sample_shape)

    def way(denoiser: nn.Module) -> Trajectory:
        return Trajectory(denoiser, torch.tensor([0]), steps=steps, scheduler=net.scheduler, guidance=net.guidance)

    ours, plain, fast = way(net), way(plain_of()), way(compiled(plain_of()))
    schedule = trunk_forecast(net, steps, every=2)
    theirs = way(WholeSteps(plain_of, schedule, ours.timesteps))
    cache, weights = schedule.new_cache(net), schedule.forecast_weights_on(x.device)

    def forecast(s: int) -> Tensor:
        return ours.step(x, s, row=schedule.rows[s], forecast_weights=weights[s], cache=cache)

    with torch.no_grad():
        for s in range(FORECAST):
            theirs.step(x, s), forecast(s)
    made = [Candidate(partial(way.step, x, FORECAST), rival=way is fast) for way in (plain, fast, ours)]
    made += [Candidate(partial(theirs.step, x, FORECAST), near=ROUGH[tiny]),
             Candidate(partial(forecast, FORECAST), like=f"trunk forecast: {PLAIN}")]
    return without_grad(dict(zip(STEP, made)))


def whole(model: str, images: int, steps: int, tiny: bool) -> Mapping[str, Candidate]:
    """Trajectories with guidance, uncached, and by schedules that compute every second step."""
    images, steps = (1, 3) if tiny else (images, steps)
    net, config = random_dit(model, 1 if tiny else None)
    if model != "fashion-dit":
        random_weights(net)
    plain_of = partial(Plain, net, torch.float32, config)
    labels, noise = torch.arange(images), image_noise(0, 0, images, net.sample_shape)

    def way(denoiser: nn.Module, schedule: Schedule | None = None) -> Callable[[], Tensor]:
        return partial(denoise, Trajectory(denoiser, labels, steps=steps), noise, schedule)

    timesteps = Trajectory(net, labels, steps=steps).timesteps
    every, trunk = fora(net, steps, 2), trunk_forecast(net, steps, every=2)
    made = [Candidate(way(plain_of())), Candidate(way(compiled(plain_of())), 1e-3, rival=True),
            Candidate(way(net), 1e-3),
            Candidate(way(ReferenceWay(plain_of(), every, timesteps)), near=ROUGH[tiny]),
            Candidate(way(net, every), 1e-3, like="FORA n=2: reference's way"),
            Candidate(way(WholeSteps(plain_of, trunk, timesteps)), near=ROUGH[tiny]),
            Candidate(way(net, trunk), 1e-3, like=f"trunk n=2: {PLAIN}")]
    return without_grad(dict(zip(WHOLE, made)))


def without_grad(made: Mapping[str, Candidate]) -> dict[str, Candidate]:
    return {name: one._replace(call=torch.no_grad()(one.call)) for name, one in made.items()}


CASES = [Case(f"{model}, one block: a step", STEP, partial(step, model), 9) for model in ("DiT-XL/2", PIXART)] + [
    Case("fashion-dit, T = 20, 4 images", WHOLE, partial(whole, "fashion-dit", 4, 20), 7),
    Case("DiT-S/2, T = 4, 1 image", WHOLE, partial(whole, "DiT-S/2", 1, 4), 5)]

"""A trajectory: the way from noise to image, without the decision rows. Sampler, trainer and λ refresh use it."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.flops import runs_by_its_loop
from harmonica_kernels import ops
from harmonica_kernels.graphs.gated import Loop

from .schedulers import ReferenceDDIM, config_of, make_scheduler, scheduler_name

# Images to train or calibrate on are numbered from here, so that no sampled image has noise from them.
FIRST_IMAGE = 1 << 32


def image_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise [count, *shape] of images first, first+1, … of a seed. It does not depend on the batch size."""
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in range(first, first + count)]
    return torch.from_numpy(np.stack(draws))


class Guided(NamedTuple):
    """A model with classifier-free guidance (Ho & Salimans, 2022). Every step of a trajectory calls it.

    Args:
        net: a denoiser. scale: of the guidance; 1 runs no unconditional half of the batch. channels: how many leading
            output channels are guided. autocast: "bfloat16" runs the model under autocast in it, None as it is.
        both: whether the output has the unconditional half too, as facebookresearch/DiT's `forward_with_cfg` has it:
            the guided channels are those of the other half. x then has 2n rows, of which the model takes the first n.
    """

    net: Any
    scale: float
    channels: int
    autocast: str | None = None
    both: bool = False

    def __call__(self, x: Tensor, t: Tensor, labels: Tensor, **forward) -> Tensor:
        """The guided output, of x's shape and dtype but for its channels, for x [n, C, H, W] at the timestep t [].

        labels: [n] or, with guidance, [2n]; the second half are then labels that stand for none. forward: row, cache
        and so on.
        """
        conditional, unconditional = (None if o is None else o.to(x.dtype)
                                      for o in self.outputs(x, t, labels, **forward))
        if unconditional is None:
            return conditional
        guided = unconditional.lerp(conditional, self.scale)
        halves = [conditional, unconditional] if self.both else [conditional]
        if self.channels < guided.shape[1]:
            halves = [torch.cat([guided[:, : self.channels], half[:, self.channels :]], 1) for half in halves]
        else:
            halves = [guided for _ in halves]
        return torch.cat(halves) if self.both else halves[0]

    def outputs(self, x: Tensor, t: Tensor, labels: Tensor, **forward) -> tuple[Tensor, Tensor | None]:
        """The conditional and the unconditional output [n, C_out, H, W], in the model's dtype.

        Without guidance the unconditional output is None.
        """
        x = x[: len(labels) // 2] if self.both else x
        doubled = x if len(labels) == len(x) else torch.cat([x, x])
        with torch.autocast(x.device.type, getattr(torch, self.autocast)) if self.autocast else nullcontext():
            out = self.net(doubled, t.expand(len(labels)), labels, **forward)
        return (out, None) if doubled is x else out.chunk(2)


def run_eagerly(function: Callable[..., Any], *args, **kwargs) -> Any:
    """Returns function(*args, **kwargs).

    `harmonica_kernels.compile(run_eagerly)` is one executor for several functions, so that their graphs share a pool of
    memory.
    """
    return function(*args, **kwargs)


class Trajectory:
    """One batch's way from noise to images: model, labels, guidance and the scheduler's state.

    Args:
        net: a denoiser, `net(x, t, y, row=, forecast_weights=, cache=, threshold=)`, or one that a pipeline's own loop
            runs, see `harmonica_dit.load`.
        labels: [n] int64, one for each image: classes or, of a text model, the numbers of its prompts.
        steps: T. scheduler: a name or an instance, see `make_scheduler`; None is the model's own.
        guidance: classifier-free guidance scale; 1 runs no unconditional half of the batch; None is the model's own.
        guidance_channels: how many leading output channels are guided; a number above C_out guides all. None is the
            model's own (facebookresearch/DiT: 3; diffusers' pipelines: all but the variance).
        seed, first: the seed and the number of the first image, for schedulers that draw noise at their steps.
        autocast: "bfloat16" runs the model under autocast in it, None as it is. Everything else stays in x's dtype.
        timesteps: the T timesteps, from noise to image; None is the scheduler's own choice.
        halves: "both" keeps the unconditional half too, where guidance has one: x and the outputs then have 2n rows.
            The images are the same ("one"); only what is averaged over the rows is not.
    """

    def __init__(self, net, labels: Tensor, *, steps: int, scheduler=None, guidance: float | None = None,
                 guidance_channels: int | None = None, seed: int = 0, first: int = 0,
                 autocast: str | None = None, timesteps: Sequence[float] | None = None, halves: str = "one"):
        self.net, self.labels = net, check_labels(labels, net.num_classes)
        self.executor = run_eagerly  # runs the model in `predict`; may be `harmonica_kernels.compile(run_eagerly)`
        guidance = net.guidance if guidance is None else guidance
        self._own_loop = runs_by_its_loop(net)  # guides and scales, and is told the step
        unsaid = guidance is None and self._own_loop  # a call that has no guidance_scale
        if not unsaid and (not isinstance(guidance, Real) or not 0 <= guidance < float("inf")):
            raise ValueError(f"guidance: got {guidance!r}, expected a finite number ≥ 0 (1 is no guidance)")
        if guidance_channels is not None and guidance_channels < 1:
            raise ValueError(f"guidance_channels: got {guidance_channels}, expected at least 1")
        self.scheduler = make_scheduler(scheduler, steps, net, timesteps)
        self.timesteps = [t.item() for t in self.scheduler.timesteps]
        self._linear = isinstance(self.scheduler, ReferenceDDIM) and not self._own_loop  # a·x + b·ε, without history
        self._updates = self.scheduler.updates().tolist() if self._linear else []
        if self._own_loop:
            if guidance_channels not in (None, net.guidance_channels):
                raise ValueError(f"guidance_channels: got {guidance_channels}, but {net.name} is guided by its "
                                 "pipeline's loop; leave it out")
            self.model = net.guided(self.scheduler, guidance, autocast)
            self._t, unconditional = torch.arange(len(self.timesteps)), []
        else:
            self.model = Guided(net, guidance, guidance_channels or net.guidance_channels, autocast,
                                halves == "both" and guidance != 1)
            self._t = self.scheduler.timesteps.to(self.labels.device)
            unconditional = [] if guidance == 1 else [torch.full_like(self.labels, net.num_classes)]
        self._model_labels = torch.cat([self.labels, *unconditional])
        self.conditions = conditions_of(net, self._model_labels)
        self._generators = None
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            states = [np.random.SeedSequence((seed, i, 1)) for i in range(first, first + len(self.labels))]
            states *= 2 if self.model.both else 1  # the same noise in both halves
            self._generators = [torch.Generator().manual_seed(int(s.generate_state(1)[0])) for s in states]

    @property
    def steps(self) -> int:
        """T: how often the model is called (some schedulers call it more than once a step)."""
        return len(self.timesteps)

    @property
    def scheduler_name(self) -> str:
        """See `make_scheduler`."""
        return scheduler_name(self.scheduler)

    @property
    def scheduler_config(self) -> dict | None:
        """See `config_of`."""
        return config_of(self.scheduler)

    @property
    def can_be_recorded(self) -> bool:
        """Whether a graph can hold its steps: not where they may draw noise, or a pipeline's own loop takes them."""
        return self._generators is None and not self._own_loop

    def start(self, noise: Tensor) -> Tensor:
        """x_0 from standard normal noise [n, C, H, W]; with both halves, which start alike, [2n, C, H, W]."""
        noise = torch.cat([noise, noise]) if self.model.both else noise
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # schedulers of flow matching have none

    def predict(self, x: Tensor, s: int, **forward) -> Tensor:
        """The guided model output [n, C_out, H, W] at step s for x [n, C, H, W]; `forward`: row, cache and so on."""
        return self.executor(self.model, *self.inputs(x, s), **self.conditions, **forward)

    def inputs(self, x: Tensor, s: int) -> tuple[Tensor, Tensor, Tensor]:
        """The model's arguments at step s: x as the scheduler scales it, the timestep and the labels.

        A pipeline's own loop is given x as it is and the step's number, and does the rest.
        """
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, self.scheduler.timesteps[s])
        return x if self._own_loop else scaled, self._t[s], self._model_labels

    def step(self, x: Tensor, s: int, **forward) -> Tensor:
        """x_{s+1} from x_s [n, C, H, W]: `predict` and `advance`, without grad.

        If the device has the kernel, guidance and a linear update take one pass over the latents.
        """
        if not self._linear or x.device.type not in ops.FUSED:
            return self.advance(self.predict(x, s, **forward), s, x)
        conditional, unconditional = self.model.outputs(*self.inputs(x, s), **self.conditions, **forward)
        a, b = self._updates[s]
        return ops.guided_step(x, conditional, unconditional, guidance=self.model.scale,
                               channels=self.model.channels, a=a, b=b)

    def new_cache(self, history: int = 1, unit: str = "branch"):
        """An empty cache for this trajectory, of the branches or of the trunk."""
        if hasattr(self.net, "new_cache"):
            return self.net.new_cache(history, unit)
        return hk.FeatureCache(history) if unit == "branch" else hk.TrunkCache(history)

    def hoist(self, rows: Sequence[Sequence[bool] | None], condition: Tensor | None = None) -> Iterable[dict]:
        """Further arguments of `predict`, step by step: what the model can compute for all steps together.

        rows: the T hard rows, None where everything is computed. condition: [T, D], what a forecaster adds to the
        embedded timesteps and labels, or None.
        """
        if hasattr(self.net, "hoist"):
            return self.net.hoist(self._t, self._model_labels, rows, condition)
        return [{} if condition is None else {"condition": condition[s]} for s in range(self.steps)]

    def advance(self, output: Tensor, s: int, x: Tensor) -> Tensor:
        """x_{s+1} from x_s and the guided output; differentiable where grad is enabled."""
        C = x.shape[1]
        learned_variance = "learned" in (self.scheduler.config.get("variance_type") or "")
        if learned_variance and output.shape[1] == C:
            raise ValueError(f"scheduler: {type(self.scheduler).__name__} takes a learned variance, which "
                             f"{self.net.name} does not predict")
        output = output if learned_variance else output[:, :C]
        options = {} if self._generators is None else {"generator": self._generators}
        return self.scheduler.step(output, self.scheduler.timesteps[s], x, **options).prev_sample

    def fork(self) -> "Trajectory":
        """A copy that goes on independently: it has its own multistep history and random state, and shares the model.
        """
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        if self._generators is not None:
            other._generators = [generator.clone_state() for generator in self._generators]
        return other

    def loop(self) -> Loop:
        """The trajectory's parts for a device-gated executor, see `harmonica_kernels.compile`.

        Raises:
            TypeError: the scheduler's step is not linear in x and the output alone, or the model has no `loop_parts`.
        """
        if not self._linear:
            raise TypeError(f'scheduler: got {type(self.scheduler).__name__}; a device-gated trajectory needs "ddim", '
                            "whose step is a·x + b·ε")
        if not hasattr(self.net, "loop_parts"):
            raise TypeError(f"net: {type(self.net).__name__} has no loop_parts, of which a device-gated trajectory is "
                            'made; use mode="captured"')
        net, guided = self.net, self.model.scale != 1
        weight = next(net.parameters())
        condition = torch.zeros(self.steps, net.width, dtype=weight.dtype, device=weight.device)
        parts = net.loop_parts(self._t, self._model_labels, condition, **self.conditions)
        embed = parts.pop("embed")
        return Loop(**parts, embed=lambda x: embed(torch.cat([x, x]) if guided else x),
                    updates=self.scheduler.updates(), guidance=self.model.scale, channels=self.model.channels,
                    condition=condition)

    def graph_parts(self) -> tuple[tuple, tuple[Tensor, ...], Callable[[Tensor], "Trajectory"]]:
        """Key, tensors and a copying function for an executor, see `harmonica_kernels.compile`.

        Raises:
            RuntimeError: a pipeline's own loop runs the model, on the host, which a replayed graph would not do again.
        """
        if self._own_loop:
            raise RuntimeError(f"executor: {self.net.name} is run by its pipeline's loop, on the host; use \"eager\"")
        key = (*self.model, tuple(self.timesteps), type(self.scheduler), self.scheduler.to_json_string())
        return key, (self._model_labels, *self.conditions.values()), self._relabel

    def _relabel(self, model_labels: Tensor, *conditions: Tensor) -> "Trajectory":
        """A fork that reads its labels, [n] or, with guidance, [2n], and their conditions from these tensors."""
        other = self.fork()
        other._model_labels, other.labels = model_labels, model_labels[: len(self.labels)]
        other.conditions = dict(zip(self.conditions, conditions, strict=True))
        return other


def conditions_of(net, labels: Tensor) -> dict[str, Tensor]:
    """Further arguments of a denoiser's forward for these labels [B], which a text model looks up on the host."""
    return net.conditions(labels) if hasattr(net, "conditions") else {}


def check_labels(labels, classes: int) -> Tensor:
    """`labels` as int64 [n].

    Raises:
        ValueError: it is empty, not one-dimensional, not of integers, or has a label outside 0..classes-1.
    """
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"labels: got {labels!r}, expected whole numbers [n]") from None
    if labels.dim() != 1 or labels.numel() == 0 or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"labels: got {labels.dtype} of shape {tuple(labels.shape)}, expected whole numbers [n]")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels: got {labels.min().item()} to {labels.max().item()}, expected 0 to {classes - 1}")
    return labels.long()

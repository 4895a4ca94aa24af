"""A trajectory: everything between noise and image but the gate rows. Sampler, trainer and λ refresh all walk it."""

import copy
import inspect
from contextlib import nullcontext
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from .schedulers import make_scheduler


def image_noise(seed: int, first: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Starting noise [count, *shape] of the images number first, first+1, … of a seed, whatever the batch split."""
    draws = [np.random.default_rng((seed, i)).standard_normal(shape, np.float32) for i in range(first, first + count)]
    return torch.from_numpy(np.stack(draws))


class Trajectory:
    """One batch's way from noise to images: model, labels, guidance and the scheduler's state.

    Args:
        net: a denoiser, `net(x, t, y, gate=, extrapolate=, cache=, threshold=)`, see `harmonica_dit.load`.
        labels: [n] int64, one for each image: classes or, of a text model, the numbers of its prompts.
        steps: T. scheduler: a name or an instance, see `make_scheduler`; None is the model's own.
        guidance: classifier-free guidance scale; 1 runs no unconditional rows; None is the model's own.
        guidance_channels: how many leading output channels are guided, or a number above all to guide all; None is the
            model's own (facebookresearch/DiT: 3; diffusers' pipelines: all but the variance).
        seed, first: number the images, for schedulers that draw noise on the way.
        autocast: "bfloat16" runs the model under autocast in it, None as it is; all else stays in x's dtype.
    """

    def __init__(self, net, labels: Tensor, *, steps: int, scheduler=None, guidance: float | None = None,
                 guidance_channels: int | None = None, seed: int = 0, first: int = 0,
                 autocast: str | None = None):
        self.net, self.labels = net, check_labels(labels, net.num_classes)
        guidance = net.guidance if guidance is None else guidance
        if not isinstance(guidance, Real) or not 0 <= guidance < float("inf"):
            raise ValueError(f"guidance: got {guidance!r}, expected a finite number ≥ 0 (1 is no guidance)")
        if guidance_channels is not None and guidance_channels < 1:
            raise ValueError(f"guidance_channels: got {guidance_channels}, expected at least 1")
        self.guidance, self.guidance_channels = guidance, guidance_channels or net.guidance_channels
        self.autocast = autocast
        self.scheduler = make_scheduler(scheduler, steps, net)
        self.timesteps = [t.item() for t in self.scheduler.timesteps]
        self._t = self.scheduler.timesteps.to(self.labels.device)
        unconditional = [] if guidance == 1 else [torch.full_like(self.labels, net.num_classes)]
        self._rows = torch.cat([self.labels, *unconditional])  # one tensor throughout: a text model keeps what it found
        self._generators = None
        if "generator" in inspect.signature(self.scheduler.step).parameters:
            states = [np.random.SeedSequence((seed, i, 1)) for i in range(first, first + len(self.labels))]
            self._generators = [torch.Generator().manual_seed(int(s.generate_state(1)[0])) for s in states]

    @property
    def steps(self) -> int:
        """T: how often the model is called (some schedulers call it more than once a step)."""
        return len(self.timesteps)

    def start(self, noise: Tensor) -> Tensor:
        """x_0 from standard normal noise [n, C, H, W]."""
        return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)  # flow matching's schedulers have none

    def predict(self, x: Tensor, s: int, **forward) -> Tensor:
        """The guided model output [n, C_out, H, W] at step s for x [n, C, H, W]; `forward`: gate, cache and so on."""
        scaled = getattr(self.scheduler, "scale_model_input", lambda x, t: x)(x, self.scheduler.timesteps[s])
        rows = len(self._rows)
        scaled = scaled if rows == len(x) else torch.cat([scaled, scaled])
        with torch.autocast(x.device.type, getattr(torch, self.autocast)) if self.autocast else nullcontext():
            out = self.net(scaled, self._t[s].expand(rows), self._rows, **forward).to(x.dtype)
        if rows == len(x):
            return out
        conditional, unconditional = out.chunk(2)
        guided = unconditional.lerp(conditional, self.guidance)
        if self.guidance_channels >= out.shape[1]:
            return guided
        c = self.guidance_channels
        return torch.cat([guided[:, :c], conditional[:, c:]], 1)

    def advance(self, output: Tensor, s: int, x: Tensor) -> Tensor:
        """x_{s+1} from x_s and the guided output, without grad."""
        C = x.shape[1]
        learned_variance = "learned" in (self.scheduler.config.get("variance_type") or "")
        if learned_variance and output.shape[1] == C:
            raise ValueError(f"scheduler: {type(self.scheduler).__name__} takes a learned variance, which "
                             f"{self.net.name} does not predict")
        output = output.detach() if learned_variance else output.detach()[:, :C]
        options = {} if self._generators is None else {"generator": self._generators}
        return self.scheduler.step(output, self.scheduler.timesteps[s], x.detach(), **options).prev_sample

    def fork(self) -> "Trajectory":
        """A copy that goes on from here by itself: multistep history and random state are copied, the model is not."""
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        if self._generators is not None:
            other._generators = [generator.clone_state() for generator in self._generators]
        return other


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

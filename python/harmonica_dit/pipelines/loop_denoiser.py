"""Any diffusers pipeline as a denoiser, to train on: its own loop guides, the generic adapter runs its transformer."""

import copy
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from harmonica_dit.flops import Flops
from harmonica_dit.sample.decoding import AT_ONCE

from .adapters import model_name
from .adapters.generic import GenericAdapter
from .calls import Call
from .conditions import Conditions, Encoder, moved
from .own_loop import OwnLoop
from .step_cache import StepCache
from .trainable import WITHOUT, check_call, transformer_of, with_negatives


class LoopDenoiser(nn.Module):
    """A pipeline's transformer as a denoiser (see `harmonica_dit.load`) whose guided output the pipeline's loop makes.

    It is called through a `Trajectory`. One call of the pipeline up to its first step's end, and one through all steps
    without the transformer, tell what the loop does.

    Args:
        pipe: a diffusers pipeline; it and its modules stay as they are.
        prompts: what it is trained on, see `Conditions`; the labels are their numbers.
        call: further arguments of its call, such as height, width and guidance_scale.
        name: routers trained on this denoiser record it; None is the repository or folder of the pipeline.
        embeddings: file for the encoded prompts; if it exists, they are read from it.

    Attributes:
        guidance: the call's guidance_scale; None where it has none. sample_shape: of an image's latents, as the
            scheduler is given them. resolution: height and width of what the transformer is given, or, where that is
            packed, tokens and channels. width: D, if it is that of the trunk's state; else 1, and a forecaster weighs
            all channels alike.

    Raises:
        TypeError, ValueError: the pipeline or its call cannot be trained on so; the message says why.
    """

    guided_by_its_loop = True  # a `Trajectory` calls `guided`, and not the model

    def __init__(self, pipe: DiffusionPipeline, prompts: Sequence[str | Mapping[str, Any]],
                 call: Mapping[str, Any] | None = None, name: str | None = None,
                 embeddings: str | os.PathLike | None = None):
        super().__init__()
        self.transformer = transformer_of(pipe)
        self.adapter = GenericAdapter(self.transformer)
        self.scheduler, self.prompts = pipe.scheduler, Conditions(with_negatives(prompts, call or {}))
        self.call = check_call(pipe, dict(call or {}))
        self.name = name or model_name(pipe.config.get("_name_or_path") or self.adapter.name)
        own = copy.copy(pipe)
        own.set_progress_bar_config(disable=True)
        about = dict(model=self.name, dtype=str(self.transformer.dtype), prompts=self.prompts.checksum)
        encoder = Encoder(own.encode_prompt) if hasattr(own, "encode_prompt") else None
        if encoder is not None:
            vars(own)["encode_prompt"] = encoder
            if embeddings is not None and Path(embeddings).exists():
                encoder.load(embeddings, about)
        self._loop = OwnLoop(own, self.transformer)
        self._guided: dict[tuple, GuidedLoop] = {}
        self._batch: tuple[tuple, dict] | None = None  # the latest labels and device, and their arguments
        parameters = inspect.signature(type(pipe).__call__).parameters
        default = parameters["guidance_scale"].default if "guidance_scale" in parameters else None
        self.guidance: float | None = self.call.get("guidance_scale", default)
        self._record()
        if encoder is not None:
            self._encode(encoder)
            if encoder.by_text and embeddings is not None and not Path(embeddings).exists():
                encoder.save(embeddings, about)

    def _encode(self, encoder: Encoder) -> None:
        """Encodes all prompts, and lets the text encoders go if batches can be put together without them."""
        scheduler = copy.deepcopy(self.scheduler)
        for i in range(self.num_classes):
            self.set_timesteps(scheduler, 2, (0, i))
        if encoder.by_text:
            encoder.release()
            own = self._loop.pipe
            vars(own).update({name: None for name in own.components if name.startswith("text_encoder")})

    def _record(self) -> None:
        """Looks at the first step of a call."""
        first: list[Call] = []

        def trace(j: int, forward, args: tuple, kwargs: dict):
            if first:
                return forward(*args, **kwargs)
            first.append(Call(self.transformer, forward, args, kwargs))
            self.adapter.trace_call(forward, args, kwargs)
            unit = "branch" if self.trunk_left_out else "trunk"
            cache = self.adapter.new_cache(unit=unit)
            output = self.adapter._call(forward, args, kwargs, None, None, cache)
            widths = {self.architecture["D"]} if unit == "branch" else {t.shape[-1] for t in cache.newest()}
            self.width = widths.pop() if widths == {self.architecture["D"]} else 1
            return output

        scheduler = copy.deepcopy(self.scheduler)
        arguments = self.arguments(torch.zeros(1, dtype=torch.long), 2)
        x = self._loop.begin(scheduler, arguments, trace)
        if len(x) != 1:
            raise ValueError(f"prompts: the first one makes {len(x)} images, expected one")
        self.sample_shape, self.resolution = tuple(x.shape[1:]), tuple(first[0].latents[0].shape[-2:])
        self.guidance_channels = self.sample_shape[0]
        noise = torch.randn(x.numel(), dtype=x.dtype, generator=torch.Generator().manual_seed(0))
        packed = torch.equal(x.cpu().flatten().sort()[0], noise.sort()[0])  # noise in some order, and nothing else
        self._loop.puts_latents = packed and hasattr(self._loop.pipe, "prepare_latents")
        self.guided(self.set_timesteps(scheduler, 2), self.guidance)  # raises now what it would raise then

    @property
    def num_classes(self) -> int:
        """How many prompts there are."""
        return len(self.prompts.prompts)

    @property
    def branch_names(self) -> tuple[str, ...]:
        """See `GenericAdapter`; so are the next five."""
        return self.adapter.branch_names

    @property
    def architecture(self) -> dict[str, str | int]:
        return self.adapter.architecture

    @property
    def flops(self) -> Flops:
        return self.adapter.flops

    @property
    def trunk_flops(self) -> Flops | None:
        return self.adapter.trunk_flops

    @property
    def trunk_size(self) -> int | None:
        return self.adapter.trunk_size

    @property
    def trunk_left_out(self) -> str:
        return self.adapter.trunk_left_out

    def forward(self, *_, **__):
        """Refuses: see `Trajectory`."""
        raise TypeError(f"net: {self.name} is run by its pipeline's loop, step by step; call a Trajectory's predict")

    def arguments(self, labels: Tensor, steps: int) -> dict[str, Any]:
        """Of the pipeline's call for images of these labels [n]."""
        numbers, device = tuple(labels.tolist()), next(self.parameters()).device
        if self._batch is None or self._batch[0] != (numbers, device):
            self._batch = (numbers, device), moved(self.prompts.arguments(numbers), device)
        return self.call | self._batch[1] | WITHOUT | dict(num_inference_steps=steps)

    def set_timesteps(self, scheduler: SchedulerMixin, steps: int, labels: Sequence[int] = (0,)) -> SchedulerMixin:
        """Sets a scheduler's timesteps as the pipeline's call does for images of these labels. Returns it."""
        x = self._zeros().expand(len(labels), *self.sample_shape)
        self._loop.set_timesteps(scheduler, x, self.arguments(torch.tensor(labels), steps))
        return scheduler

    def guided(self, scheduler: SchedulerMixin, guidance: float | None, autocast: str | None = None) -> "GuidedLoop":
        """The guided model of a trajectory.

        Args:
            scheduler: at its start, with its timesteps. guidance: in place of the call's guidance_scale. autocast: see
                `Guided`.

        Raises:
            ValueError: the pipeline's loop is not one evaluation of the latents and one scheduler's step after the
                other, or it has no guidance_scale; the message says what it does.
        """
        config = json.dumps({name: str(value) for name, value in scheduler.config.items()}, sort_keys=True)
        times = scheduler.timesteps
        key = type(scheduler), config, tuple(times.tolist()), times.device, guidance, autocast
        if key not in self._guided:
            made = GuidedLoop(self, copy.deepcopy(scheduler), guidance, autocast)
            made.check(self._zeros())
            self._guided[key] = made
        return self._guided[key]

    @property
    def decodes(self) -> bool:
        """Whether the pipeline has what makes images of its latents."""
        return getattr(self._loop.pipe, "vae", None) is not None

    def decode(self, latents: Tensor) -> Tensor:
        """Images of latents [n, …], by the pipeline itself, in [-1, 1]: [n, 3, H, W], of videos [n, frames, 3, H, W].

        Without a VAE latents stay latents.
        """
        if not self.decodes:
            return latents
        images, scheduler = [], self.set_timesteps(copy.deepcopy(self.scheduler), 1)
        for part in latents.split(AT_ONCE):
            arguments = self.arguments(torch.zeros(len(part), dtype=torch.long), 1) | dict(output_type="pt")
            images.append(self._loop.finish(scheduler, part, arguments)[0].float())
        return 2 * torch.cat(images) - 1

    def new_cache(self, history: int = 1, unit: str = "branch", runs: tuple[int, ...] | None = None) -> StepCache:
        """A cache for one trajectory. runs: a schedule's, which has to have none.

        Raises:
            ValueError: it has some.
        """
        if runs is not None:
            raise ValueError("schedule: decides on runs of branches, which needs a model with a fused adapter; "
                             f"{self.name} has none")
        return StepCache(lambda: self.adapter.new_cache(history, unit))

    def _zeros(self) -> Tensor:
        return torch.zeros(1, *self.sample_shape, device=next(self.parameters()).device)


class GuidedLoop:
    """The guided output of each step, by a pipeline's own loop; used by a `Trajectory` in place of `Guided`.

    Args:
        net: whose loop. scheduler: at its start, with its timesteps. scale: guidance_scale. autocast: see `Guided`.
    """

    both = False  # the loop gives its guided output only

    def __init__(self, net: LoopDenoiser, scheduler: SchedulerMixin, scale: float | None, autocast: str | None):
        self.net, self.scheduler, self.scale, self.autocast = net, scheduler, scale, autocast
        self.given: dict[str, Any] = {}
        if scale != net.guidance:
            if net.guidance is None:
                raise ValueError(f"guidance: got {scale}, but {type(net._loop.pipe).__name__} is called without "
                                 "guidance_scale; give what it has in its place as call=")
            self.given = dict(guidance_scale=scale)

    def __call__(self, x: Tensor, s: Tensor, labels: Tensor, *, row=None, forecast_weights=None,
                 cache: StepCache | None = None, threshold: float = 0.1) -> Tensor:
        """The guided output at step s [], of x's shape and dtype, for x [n, …]; the others as in the generic adapter.
        """
        def predict(j: int, forward, args: tuple, kwargs: dict):
            with torch.autocast(x.device.type, getattr(torch, self.autocast)) if self.autocast else nullcontext():
                return self.net.adapter._call(forward, args, kwargs, row, forecast_weights,
                                              None if cache is None else cache.of_call(j), threshold)

        return self.net._loop.output(self.scheduler, int(s), x, predict, self._arguments(labels)).to(x.dtype)

    def outputs(self, x: Tensor, s: Tensor, labels: Tensor, **forward) -> tuple[Tensor, None]:
        """As `Guided.outputs`, but guided: the loop does not give its parts."""
        return self(x, s, labels, **forward), None

    def _arguments(self, labels: Tensor) -> dict[str, Any]:
        return self.net.arguments(labels, len(self.scheduler.timesteps)) | self.given

    def check(self, x: Tensor) -> None:
        """Refuses a loop whose steps cannot be run one by one. x: any latents [1, …]."""
        x = torch.arange(x.numel(), device=x.device, dtype=x.dtype).view_as(x)  # another order would be seen
        T, pipe = len(self.scheduler.timesteps), type(self.net._loop.pipe).__name__
        times = self.scheduler.timesteps.tolist()
        if getattr(self.scheduler, "order", 1) > 1 or len(set(times)) < T:
            raise ValueError(f"scheduler: {type(self.scheduler).__name__} evaluates the model several times a step; "
                             "use one of one a step")
        seen = self.net._loop.watch(self.scheduler, x, self._arguments(torch.zeros(1, dtype=torch.long)))
        if len(seen.samples) != T:
            raise ValueError(f"pipe: {pipe} makes {len(seen.samples)} steps, its scheduler has {T}")
        if not seen.grad:
            raise ValueError(f"pipe: {pipe} turns grad off in its loop, so nothing can be trained through it")
        for s, sample in enumerate(seen.samples):
            if sample.shape != x.shape or not torch.equal(sample, x.to(sample.dtype)):
                where = "before the first step" if s == 0 else "between two of the scheduler's steps"
                raise ValueError(f"pipe: {pipe} changes the latents {where}, so its steps cannot be run one by one")
            if seen.calls[s] != seen.calls[0] or not seen.calls[s]:
                raise ValueError(f"pipe: {pipe} calls its transformer otherwise at step {s} than at step 0 "
                                 f"({len(seen.calls[s])} and {len(seen.calls[0])} times); guidance has to be the same "
                                 "at all steps")

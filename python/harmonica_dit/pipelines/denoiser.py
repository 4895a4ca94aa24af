"""A diffusers pipeline's transformer as a denoiser, to train on: on the fused path here, or by the pipeline's own loop.
"""

import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from harmonica_dit.models import VAE_FACTOR, latent_side
from harmonica_dit.repository import check_reachable
from harmonica_dit.sample.decoding import load_vae

from .adapters import adapt, model_name
from .loop_denoiser import LoopDenoiser
from .prompts import Prompts, prepare
from .trainable import check_class, check_transformers

PIPELINES = ("DiTPipeline", "PixArtAlphaPipeline", "PixArtSigmaPipeline")  # their transformers have fused adapters
GIVE = "give some prompts, such as those it will be used with"


class PipelineDenoiser(nn.Module):
    """The transformer of a class- or text-conditional pipeline, called like a denoiser (see `harmonica_dit.load`).

    Args:
        transformer: diffusers', of a class that has a fused adapter.
        scheduler: the pipeline's. guidance: the pipeline's default scale.
        name: routers trained on this denoiser record it.
        prompts: of a text model, whose labels are the prompts' numbers. None is a class-conditional model.
        image_size: in pixels; None is the size that the transformer was made for.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    def __init__(self, transformer: nn.Module, scheduler: SchedulerMixin, *, name: str, guidance: float,
                 prompts: Prompts | None = None, image_size: int | None = None):
        super().__init__()
        config = transformer.config
        self.transformer, self.adapter = transformer, adapt(transformer)
        self.name, self.scheduler, self.guidance, self.prompts = name, scheduler, guidance, prompts
        self.branches, self.branch_names = self.adapter.branches, self.adapter.branch_names
        self.architecture = self.adapter.architecture
        size = config.sample_size if image_size is None else latent_side(image_size, config.patch_size)
        self.sample_shape = (config.in_channels, size, size)
        self.tokens, self.width = (size // config.patch_size) ** 2, transformer.inner_dim
        self.guidance_channels = config.in_channels  # the learned variance comes after these and is not guided
        self.num_classes = config.num_embeds_ada_norm if prompts is None else len(prompts.texts)

    def conditions(self, y: Tensor) -> dict[str, Tensor]:
        """What `forward` is given of the prompts numbered y [B], on y's device; nothing without prompts.

        They are looked up on the host, which no recorded graph does again: a `Trajectory` does it once.
        """
        return {} if self.prompts is None else self.prompts.conditions(y, self.transformer.dtype)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, encoder_hidden_states: Tensor | None = None,
                encoder_attention_mask: Tensor | None = None, **run) -> Tensor:
        """The transformer's output [B, C_out, H, W] for x [B, C, H, W] at timesteps t [B].

        y: [B] classes, or prompts' numbers; `num_classes` stands for none. The next two: from `conditions`, which is
        asked if they are None. run: row, forecast_weights, cache and threshold as in
        `harmonica_kernels.cached_forward`.
        """
        x = x.to(self.transformer.dtype)
        if self.prompts is None:
            return self.adapter(x, timestep=t, class_labels=y, return_dict=False, **run)[0]
        text = dict(encoder_hidden_states=encoder_hidden_states, encoder_attention_mask=encoder_attention_mask)
        text = self.conditions(y) if encoder_hidden_states is None else text
        return self.adapter(x, timestep=t, return_dict=False, **text, **self._micro_conditions(len(y), x), **run)[0]

    def loop_parts(self, t: Tensor, y: Tensor, condition: Tensor, **text: Tensor) -> dict[str, Any]:
        """Of the arguments of a `harmonica_kernels.graphs.gated.Loop`, those that the model answers for.

        t: [T]. y: [B], as in `forward`. condition: [T, D], added to the embedded timesteps; read whenever the loop's
        modulation is computed. text: from `conditions`.
        """
        given = dict(class_labels=y) if self.prompts is None else dict(
            batch=len(y), **text, **self._micro_conditions(len(t) * len(y), condition.to(self.transformer.dtype)))
        return self.adapter.loop_parts(t, condition, **given) | dict(
            branches=self.branches, eps=self.transformer.norm_out.eps,
            embed=lambda x: self.transformer.pos_embed(x.to(self.transformer.dtype)),
            head=lambda x: self.adapter.head(x, self.sample_shape))

    def _micro_conditions(self, B: int, x: Tensor) -> dict:
        """The image's size and aspect ratio, which PixArt-α at 1024 pixels is conditioned on."""
        if not self.transformer.use_additional_conditions:
            return dict(added_cond_kwargs=dict(resolution=None, aspect_ratio=None))
        pixels = float(VAE_FACTOR * self.sample_shape[1])
        return dict(added_cond_kwargs=dict(resolution=x.new_full((B, 2), pixels), aspect_ratio=x.new_ones(B, 1)))


def load_pipeline(source: str | DiffusionPipeline, *, prompts: Sequence[str | Mapping[str, Any]] | None,
                  call: Mapping[str, Any] | None, embeddings: str | os.PathLike | None, image_size: int | None,
                  vae: str | os.PathLike | None, dtype: torch.dtype,
                  device: str | torch.device) -> PipelineDenoiser | LoopDenoiser:
    """The denoiser of a diffusers pipeline, in memory or in a folder or repository, see `harmonica_dit.load`.

    The text encoder of one that is loaded does not stay in memory. vae: in place of the pipeline's own.
    """
    if isinstance(source, DiffusionPipeline):
        kind, name = type(source).__name__, source.config.get("_name_or_path")
        name = model_name(name) if name else type(getattr(source, "transformer", source)).__name__
        parts = source.components
    elif not isinstance(source, str):
        raise TypeError(f"name: got {type(source).__name__}, expected a name, or a diffusers pipeline")
    else:
        check_reachable("name", source, "model_index.json")
        parts, name = DiffusionPipeline.load_config(source), model_name(source)
        kind = parts.get("_class_name")
    if kind not in PIPELINES:
        if vae is not None:
            raise ValueError(f"vae: {name} is a {kind}, which has its own")
        return _load_loop(source, kind, name, prompts, call, embeddings, image_size, dtype, device)
    if call is not None:
        raise ValueError(f"call: {name} is a {kind}, for which image_size= says the size, and guidance=, where it is "
                         "trained, the scale")
    if "text_encoder" in parts and prompts is None:
        raise ValueError(f"prompts: {name} is conditioned on text; {GIVE}")
    if "text_encoder" not in parts and (prompts is not None or embeddings is not None):
        raise ValueError(f"prompts: {name} is conditioned on classes and takes none")
    cls, pipe = getattr(diffusers, kind), source
    texts = None if prompts is None else prepare(name, cls, source, prompts, dtype, device, embeddings)
    if isinstance(source, str):
        unused = {part: None for part in ("vae", "text_encoder", "tokenizer") if part in parts}
        pipe = cls.from_pretrained(source, dtype=dtype, **unused)
    guidance = inspect.signature(cls.__call__).parameters["guidance_scale"].default
    net = PipelineDenoiser(pipe.transformer, pipe.scheduler, name=name, guidance=guidance, prompts=texts,
                           image_size=image_size)
    if vae is not None:
        net.vae = load_vae(vae, net.sample_shape[0])
    elif pipe is source:
        net.vae = pipe.vae
    elif parts.get("vae", [None])[0] is not None:
        net.vae = load_vae(source, net.sample_shape[0], subfolder="vae")
    return net if pipe is source else net.eval().requires_grad_(False).to(device)


def _load_loop(source: str | DiffusionPipeline, kind: str, name: str, prompts, call, embeddings, image_size: int | None,
               dtype: torch.dtype, device: str | torch.device) -> LoopDenoiser:
    """The denoiser of a pipeline whose own loop guides."""
    cls = type(source) if isinstance(source, DiffusionPipeline) else getattr(diffusers, kind or "", None)
    if cls is None:
        raise ValueError(f"name: {name} is a {kind}, which diffusers does not have; load the pipeline yourself, and "
                         "give it in place of its name")
    check_class(cls)
    if prompts is None:
        raise ValueError(f"prompts: {name} is a {kind}; {GIVE}")
    size = {} if image_size is None else dict(height=image_size, width=image_size)
    if isinstance(source, DiffusionPipeline):
        return LoopDenoiser(source, prompts, size | dict(call or {}), embeddings=embeddings)
    config = DiffusionPipeline.load_config(source)
    check_transformers(cls, [part for part, (library, *_) in _parts(config) if library is not None])
    encoded = embeddings is not None and os.path.exists(embeddings)
    unused = {part: None for part, _ in _parts(config) if part.startswith("text_encoder") and encoded}
    pipe = cls.from_pretrained(source, dtype=dtype, **unused).to(device)
    return LoopDenoiser(pipe, prompts, size | dict(call or {}), name, embeddings).eval().requires_grad_(False)


def _parts(config: dict) -> list[tuple[str, list]]:
    """The components in a pipeline's configuration: name, and library and class."""
    return [(name, value) for name, value in config.items() if isinstance(value, list) and len(value) == 2]

"""What an entry of many_pipes.PIPES is: a small pipeline of a real class, how it is called and what it accepts."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, DiffusionPipeline

from support.generic_models import MODELS
from support.pipes import random_weights

FOUR_SIGMAS = dict(sigmas=[1.0, 0.8, 0.5, 0.2])
FOUR_TIMESTEPS = dict(timesteps=[901, 667, 400, 133])


@dataclass(frozen=True)
class Draw:
    """Normal noise in a dtype: the same values in each."""
    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator).to(self.dtype)

    def prompts(self, batch: int, tokens: int, width: int, pooled: int | None = None, masks=False) -> dict:
        """Embeddings of prompts and negative prompts, by the names that most pipelines have for them."""
        given = {}
        for which, padding in (("", 1), ("negative_", 2)):
            given[f"{which}prompt_embeds"] = self(batch, tokens, width)
            if pooled:
                given[f"{which}pooled_prompt_embeds"] = self(batch, pooled)
            if masks:
                mask = torch.ones(batch, tokens, dtype=torch.long)
                mask[:, -padding:] = 0
                given[f"{which}prompt_attention_mask"] = mask
        return given


@dataclass(frozen=True)
class SmallPipe:
    """A pipeline with guidance on, unless a call is given `**unguided`. What it does not have is None or {} here."""
    build: Callable[[], DiffusionPipeline]
    arguments: Callable[[int, Draw], dict]            # of a call for that many prompts
    calls: int                                        # of transformers in a step, guided
    rows: int                                         # of such a call for an image: 2 where it has both prompts' halves
    guidance: str | None = "guidance_scale"
    guided_at: float = 3.0
    unguided_at: float = 1.0
    transformers: tuple[str, ...] = ("transformer",)
    batches: bool = True                              # takes several prompts
    copies: str | None = "num_images_per_prompt"      # several images of a prompt given as embeddings
    other_size: dict = field(default_factory=lambda: dict(height=64, width=64))
    own_steps: dict = field(default_factory=lambda: FOUR_SIGMAS)  # of the caller: four, by each of these arguments
    callback: str | None = "callback_on_step_end"
    strength: float | None = None                     # of image to image: its share of the steps runs

    @property
    def unguided(self) -> dict:
        return {self.guidance: self.unguided_at} if self.guidance else {}

    def steps_run(self, steps: int) -> int:
        return steps if self.strength is None else steps - int(steps - steps * self.strength)

    def pipe(self, seed=0) -> DiffusionPipeline:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe = self.build()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, *, steps=6, batch=1, seed=0, **changes) -> torch.Tensor:
        """The pipeline's output: latents, where the pipeline can return them."""
        draw = Draw(torch.Generator().manual_seed(seed), pipe.transformer.dtype)
        settings = dict(num_inference_steps=steps, generator=draw.generator, output_type="latent")
        if self.guidance:
            settings[self.guidance] = self.guided_at
        if self.strength is not None:
            settings["strength"] = self.strength
        return pipe(**settings | self.arguments(batch, draw) | changes, return_dict=False)[0]

    def to_train_on(self, prompts: int = 2, dtype=torch.float32) -> dict:
        """`prompts`, each by its embeddings, and `call`, as `harmonica_dit.load` takes them."""
        draw = Draw(torch.Generator().manual_seed(0), dtype)
        each = [self.arguments(1, draw) for _ in range(prompts)]
        call = {} if self.guidance is None else {self.guidance: self.guided_at}
        call |= {} if self.strength is None else dict(strength=self.strength)
        return dict(
            prompts=[{name: value for name, value in one.items() if "prompt" in name and value is not None}
                     for one in each],
            call=call | {name: value for name, value in each[0].items() if "prompt" not in name or value is None})


def one_call(build, arguments, **flags) -> SmallPipe:
    """Both prompts of an image in one forward."""
    return SmallPipe(build, arguments, calls=1, rows=2, **flags)


def two_calls(build, arguments, **flags) -> SmallPipe:
    """A forward with the prompt, then one with the negative prompt."""
    return SmallPipe(build, arguments, calls=2, rows=1, **flags)


def small_transformer(cls: type, std=0.15, **changes):
    """`cls` as in generic_models, with some settings changed."""
    config, _ = MODELS[cls.__name__]()
    return random_weights(cls(**config | changes), std)


def image_vae(latent_channels: int) -> AutoencoderKL:
    """It halves height and width."""
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                         shift_factor=0.0, scaling_factor=1.0).eval()

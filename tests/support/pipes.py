"""Small pipelines of the real classes with random weights, and a slow cache of their branches made of forward hooks."""

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)

from harmonica_dit import Schedule
from harmonica_dit.flops import Flops

LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


def random_weights(model, std=0.15):
    """Every parameter drawn anew, so that nothing is 0 and no gate hides its branch."""
    for p in model.parameters():
        p.data.normal_(std=std)
    return model.eval().requires_grad_(False)


def small_dit(**changes):
    settings = dict(num_attention_heads=3, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
                    sample_size=8) | changes
    return random_weights(DiTTransformer2DModel(**settings))


def small_pixart(**changes):
    settings = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=8, num_layers=2,
                    cross_attention_dim=24, sample_size=8, caption_channels=20) | changes
    return random_weights(PixArtTransformer2DModel(**settings))


def small_vae():
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
                         down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()


def make_pipe(kind: str, dtype=torch.float32, transformer=None, scheduler=None):
    """A pipeline "dit", "alpha", "alpha-1024" (with micro-conditions) or "sigma"."""
    if kind == "dit":
        scheduler = scheduler or DDIMScheduler(**LINEAR, clip_sample=False)
        pipe = DiTPipeline(transformer or small_dit(), small_vae(), scheduler)
    else:
        size = 128 if kind == "alpha-1024" else 8
        transformer = transformer or small_pixart(sample_size=size)
        cls = PixArtSigmaPipeline if kind == "sigma" else PixArtAlphaPipeline
        pipe = cls(None, None, small_vae(), transformer, scheduler or DPMSolverMultistepScheduler(**LINEAR))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype)


def run(pipe, steps=6, seed=0, images=2, guidance=3.0, **changes):
    """The pipeline's output, a tensor [images, C, H, W] (latents for PixArt)."""
    generator = torch.Generator().manual_seed(seed)
    settings = dict(num_inference_steps=steps, guidance_scale=guidance, generator=generator)
    if isinstance(pipe, DiTPipeline):
        labels = [7, 3, 999, 0][:images]
        return pipe(labels, output_type="pt", **settings | changes).images
    dtype = pipe.transformer.dtype
    text = torch.randn(2, images, 9, 20, generator=generator).to(dtype)
    mask = torch.ones(2, images, 9, dtype=torch.long)
    mask[0, :, 4:] = mask[1, :, 7:] = 0
    settings |= dict(prompt_embeds=text[0], prompt_attention_mask=mask[0], negative_prompt=None, height=16, width=24,
                     negative_prompt_embeds=text[1], negative_prompt_attention_mask=mask[1], output_type="latent",
                     use_resolution_binning=False)
    return pipe(**settings | changes).images


def names_of(transformer):
    parts = ("attn1", "attn2", "ff") if isinstance(transformer, PixArtTransformer2DModel) else ("attn1", "ff")
    return tuple(f"transformer_blocks.{i}.{part}" for i in range(len(transformer.transformer_blocks)) for part in parts)


def random_schedule(transformer, steps=6, share=0.5, forecast=True, seed=0, **made_for):
    generator = torch.Generator().manual_seed(seed)
    names = names_of(transformer)
    compute = torch.rand(steps, len(names), generator=generator) < share
    compute[0] = True
    a = torch.randn(steps, len(names), generator=generator) * 0.3 if forecast else None
    return Schedule(compute, names, Flops((1.0,) * len(names), 1.0), a, **made_for)


class HookedCache:
    """Runs a schedule on the plain diffusers model: every branch is computed, and its output replaced where reused."""

    def __init__(self, transformer, schedule):
        self.step, self.outputs, K = -1, {}, range(len(schedule.branches))
        modules = dict(transformer.named_modules())
        self.handles = [transformer.register_forward_pre_hook(self._next)]
        self.handles += [modules[schedule.branches[k]].register_forward_hook(self._hook(k)) for k in K]
        self.schedule = schedule

    def _next(self, *_):
        self.step += 1

    def _hook(self, k):
        def hook(module, args, output):
            kept = self.outputs.setdefault(k, [])  # (step, output), newest first
            if self.schedule.compute[self.step, k]:
                kept.insert(0, (self.step, output.clone()))
                return output
            latest = kept[0][1]
            if len(kept) < 2:
                return latest
            ratio = (self.step - kept[0][0]) / (kept[0][0] - kept[1][0])
            e = self.schedule.extrapolation[self.step, k].item() * ratio
            return ((1 + e) * latest.double() - e * kept[1][1].double()).to(output.dtype)
        return hook

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()

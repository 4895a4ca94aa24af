"""Small pipelines that make images."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLQwenImage,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImageImg2ImgPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)

from support.flux_pipes import SMALL, TRUE_GUIDANCE, shifting_scheduler
from support.small_pipe import FOUR_SIGMAS, FOUR_TIMESTEPS, Draw, image_vae, one_call, small_transformer, two_calls


def make_sd3():
    return StableDiffusion3Pipeline(small_transformer(SD3Transformer2DModel), FlowMatchEulerDiscreteScheduler(),
                                    None, None, None, None, None, None, None)


def sd3_arguments(batch: int, draw: Draw):
    return dict(height=64, width=48) | draw.prompts(batch, 5, 16, pooled=12)


def make_sd3_img2img():
    return StableDiffusion3Img2ImgPipeline(small_transformer(SD3Transformer2DModel), FlowMatchEulerDiscreteScheduler(),
                                           image_vae(4), None, None, None, None, None, None)


def sd3_img2img_arguments(batch: int, draw: Draw):
    return dict(height=16, width=12, image=draw(batch, 3, 16, 12).sigmoid()) | draw.prompts(batch, 5, 16, pooled=12)


def make_qwen():
    return QwenImagePipeline(shifting_scheduler(), None, None, None, small_transformer(QwenImageTransformer2DModel))


def qwen_arguments(batch: int, draw: Draw):
    mask = torch.ones(batch, 5, dtype=torch.long)
    mask[:, 4:] = 0
    return dict(height=64, width=96, prompt_embeds=draw(batch, 5, 12), prompt_embeds_mask=mask,
                negative_prompt_embeds=draw(batch, 3, 12),
                negative_prompt_embeds_mask=torch.ones(batch, 3, dtype=torch.long))


def make_qwen_img2img():
    vae = AutoencoderKLQwenImage(base_dim=4, z_dim=2, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
                                 latents_mean=[0.0, 0.0], latents_std=[1.0, 1.0]).eval()
    return QwenImageImg2ImgPipeline(shifting_scheduler(), vae, None, None,
                                    small_transformer(QwenImageTransformer2DModel))


def qwen_img2img_arguments(batch: int, draw: Draw):
    return qwen_arguments(batch, draw) | dict(height=16, width=24, image=draw(batch, 3, 16, 24).sigmoid())


def make_z_image():
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None,
                          small_transformer(ZImageTransformer2DModel))


def z_image_arguments(batch: int, draw: Draw):
    return dict(height=64, width=96, prompt_embeds=[draw(5, 12) for _ in range(batch)],
                negative_prompt_embeds=[draw(3, 12) for _ in range(batch)])


def make_lumina2():
    transformer = small_transformer(Lumina2Transformer2DModel, std=0.25)
    return Lumina2Pipeline(transformer, FlowMatchEulerDiscreteScheduler(), None, None, None)


def masked_arguments(batch: int, draw: Draw):
    return dict(height=64, width=96) | draw.prompts(batch, 5, 12, masks=True)


def make_sana():
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return SanaPipeline(None, None, None, small_transformer(SanaTransformer2DModel), scheduler)


def sana_arguments(batch: int, draw: Draw):
    return dict(height=128, width=192, negative_prompt=None, use_resolution_binning=False
                ) | draw.prompts(batch, 5, 12, masks=True)


def make_aura_flow():
    return AuraFlowPipeline(None, None, None, small_transformer(AuraFlowTransformer2DModel, std=0.18),
                            FlowMatchEulerDiscreteScheduler())


def aura_flow_arguments(batch: int, draw: Draw):
    return dict(height=48, width=32) | draw.prompts(batch, 5, 12, masks=True)


def make_hunyuan_dit():
    transformer = small_transformer(HunyuanDiT2DModel, use_style_cond_and_image_meta_size=True, learn_sigma=True)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    return HunyuanDiTPipeline(None, None, None, transformer, scheduler, None, None, requires_safety_checker=False)


def hunyuan_dit_arguments(batch: int, draw: Draw):
    second = draw.prompts(batch, 4, 16, masks=True)
    return dict(height=64, width=96, use_resolution_binning=False) | draw.prompts(batch, 3, 12, masks=True) | {
        f"{name}_2": value for name, value in second.items()}


def make_cogview4():
    transformer = small_transformer(CogView4Transformer2DModel, std=0.2)
    return CogView4Pipeline(None, None, None, transformer, shifting_scheduler())


def cogview4_arguments(batch: int, draw: Draw):
    return dict(height=64, width=96, prompt_embeds=draw(batch, 5, 12), negative_prompt_embeds=draw(batch, 3, 12))


def make_prx():
    return PRXPipeline(small_transformer(PRXTransformer2DModel, std=0.2), FlowMatchEulerDiscreteScheduler(), None, None)


def prx_arguments(batch: int, draw: Draw):
    return masked_arguments(batch, draw) | dict(use_resolution_binning=False, negative_prompt=None)


IMAGE_PIPES = {
    "sd3": one_call(make_sd3, sd3_arguments, copies=None),
    "sd3-img2img": one_call(make_sd3_img2img, sd3_img2img_arguments, copies=None, strength=0.5,
                            other_size=dict(height=16, width=16)),
    "qwen": two_calls(make_qwen, qwen_arguments, **TRUE_GUIDANCE),
    "qwen-img2img": two_calls(make_qwen_img2img, qwen_img2img_arguments, strength=0.5, **TRUE_GUIDANCE, **SMALL),
    "z-image": one_call(make_z_image, z_image_arguments, unguided_at=0.0),
    "lumina2": two_calls(make_lumina2, masked_arguments, copies=None),
    "sana": one_call(make_sana, sana_arguments, own_steps={}),
    "aura-flow": one_call(make_aura_flow, aura_flow_arguments),
    "hunyuan-dit": one_call(make_hunyuan_dit, hunyuan_dit_arguments, copies=None, own_steps={}),
    "cogview4": two_calls(make_cogview4, cogview4_arguments, own_steps=FOUR_SIGMAS | FOUR_TIMESTEPS),
    # guided, it gives the transformer two timesteps, however many rows there are
    "prx": one_call(make_prx, prx_arguments, batches=False, copies=None, own_steps=FOUR_TIMESTEPS),
}

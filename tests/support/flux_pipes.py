"""Small pipelines of Flux and its relatives."""

from diffusers import (
    AutoencoderKLFlux2,
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxImg2ImgPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)

from support.small_pipe import Draw, SmallPipe, image_vae, small_transformer, two_calls


def shifting_scheduler():
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)


def make_flux():
    return FluxPipeline(shifting_scheduler(), None, None, None, None, None,
                        small_transformer(FluxTransformer2DModel, guidance_embeds=True))


def make_flux_img2img():
    return FluxImg2ImgPipeline(shifting_scheduler(), image_vae(1), None, None, None, None,
                               small_transformer(FluxTransformer2DModel, guidance_embeds=True))


def flux_arguments(batch: int, draw: Draw):
    return dict(height=64, width=96) | draw.prompts(batch, 5, 16, pooled=12)


def flux_img2img_arguments(batch: int, draw: Draw):
    return dict(height=16, width=24, image=draw(batch, 3, 16, 24).sigmoid()) | draw.prompts(batch, 5, 16, pooled=12)


def make_chroma():
    return ChromaPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None,
                          small_transformer(ChromaTransformer2DModel))


def chroma_arguments(batch: int, draw: Draw):
    given = draw.prompts(batch, 5, 16, masks=True)
    masks = {name: mask.bool() for name, mask in given.items() if "mask" in name}
    return dict(height=64, width=96) | given | masks


def flux2_vae():
    return AutoencoderKLFlux2(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=1, sample_size=16,
                              down_block_types=("DownEncoderBlock2D",) * 2,
                              up_block_types=("UpDecoderBlock2D",) * 2).eval()


def make_flux2():
    return Flux2Pipeline(shifting_scheduler(), flux2_vae(), None, None, small_transformer(Flux2Transformer2DModel))


def flux2_arguments(batch: int, draw: Draw):
    return dict(height=16, width=24, prompt_embeds=draw(batch, 5, 16))


def make_flux2_klein():
    transformer = small_transformer(Flux2Transformer2DModel, guidance_embeds=False)
    return Flux2KleinPipeline(shifting_scheduler(), flux2_vae(), None, None, transformer)


def flux2_klein_arguments(batch: int, draw: Draw):
    return dict(height=16, width=24) | draw.prompts(batch, 5, 16)


TRUE_GUIDANCE = dict(guidance="true_cfg_scale")  # guidance_scale is an input of the transformer
SMALL = dict(other_size=dict(height=16, width=16))

FLUX_PIPES = {
    "flux": two_calls(make_flux, flux_arguments, **TRUE_GUIDANCE),
    "flux-img2img": two_calls(make_flux_img2img, flux_img2img_arguments, strength=0.5, **TRUE_GUIDANCE, **SMALL),
    "chroma": two_calls(make_chroma, chroma_arguments, copies=None),
    "flux2": SmallPipe(make_flux2, flux2_arguments, calls=1, rows=1, guidance=None, **SMALL),
    "flux2-klein": two_calls(make_flux2_klein, flux2_klein_arguments, **SMALL),
}

"""Small pipelines that make videos."""

from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from support.flux_pipes import TRUE_GUIDANCE, shifting_scheduler
from support.pipes import LINEAR
from support.small_pipe import FOUR_SIGMAS, Draw, one_call, small_transformer, two_calls


def wan_scheduler():
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def make_wan():
    return WanPipeline(None, None, None, wan_scheduler(), small_transformer(WanTransformer3DModel))


def make_wan_of_two():
    return WanPipeline(None, None, None, wan_scheduler(), small_transformer(WanTransformer3DModel),
                       small_transformer(WanTransformer3DModel), boundary_ratio=0.8)


def wan_arguments(batch: int, draw: Draw):
    return dict(height=32, width=48, num_frames=5) | draw.prompts(batch, 5, 12)


def make_hunyuan_video():
    return HunyuanVideoPipeline(None, None, small_transformer(HunyuanVideoTransformer3DModel, guidance_embeds=True),
                                None, FlowMatchEulerDiscreteScheduler(shift=7.0), None, None)


def hunyuan_video_arguments(batch: int, draw: Draw):
    return dict(height=32, width=48, num_frames=5) | draw.prompts(batch, 5, 12, pooled=10, masks=True)


def make_ltx():
    return LTXPipeline(shifting_scheduler(), None, None, None, small_transformer(LTXVideoTransformer3DModel))


def ltx_arguments(batch: int, draw: Draw):
    return dict(height=64, width=96, num_frames=9) | draw.prompts(batch, 5, 12, masks=True)


def make_cogvideox():
    transformer = small_transformer(CogVideoXTransformer3DModel, std=0.3, sample_frames=5)
    return CogVideoXPipeline(None, None, None, transformer,
                             CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True))


def cogvideox_arguments(batch: int, draw: Draw):
    return dict(height=32, width=48, num_frames=5) | draw.prompts(batch, 3, 12)


def make_mochi():
    return MochiPipeline(FlowMatchEulerDiscreteScheduler(invert_sigmas=True), None, None, None,
                         small_transformer(MochiTransformer3DModel))


def mochi_arguments(batch: int, draw: Draw):
    given = draw.prompts(batch, 3, 16, masks=True)
    return dict(height=32, width=48, num_frames=7) | given


def make_latte():
    transformer = small_transformer(LatteTransformer3DModel, out_channels=8)
    return LattePipeline(None, None, None, transformer, DDIMScheduler(**LINEAR, clip_sample=False))


def latte_arguments(batch: int, draw: Draw):
    return dict(height=48, width=48, video_length=2, negative_prompt=None, clean_caption=False
                ) | draw.prompts(batch, 5, 12)


SMALL = dict(own_steps={}, other_size=dict(height=32, width=32))
COPIES = dict(copies="num_videos_per_prompt")

VIDEO_PIPES = {
    "wan": two_calls(make_wan, wan_arguments, **SMALL, **COPIES),
    "wan-of-two": two_calls(make_wan_of_two, wan_arguments, transformers=("transformer", "transformer_2"), **SMALL,
                            **COPIES),
    "hunyuan-video": two_calls(make_hunyuan_video, hunyuan_video_arguments, **TRUE_GUIDANCE,
                               **SMALL | COPIES | dict(own_steps=FOUR_SIGMAS)),
    "ltx": one_call(make_ltx, ltx_arguments, copies=None, own_steps={}),  # it has timesteps=, but gives sigmas, too
    "cogvideox": one_call(make_cogvideox, cogvideox_arguments, copies=None, **SMALL),
    "mochi": one_call(make_mochi, mochi_arguments, copies=None, **SMALL),
    "latte": one_call(make_latte, latte_arguments, **SMALL),
}

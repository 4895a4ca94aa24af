"""Small random transformers of diffusers' classes, each with the arguments of one forward."""

import random

import diffusers
import torch

T = torch.tensor([500.0])


def _sd3():
    config = dict(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
                  num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12,
                  out_channels=4, pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")
    return config, dict(hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 3, 16),
                        pooled_projections=torch.randn(1, 12), timestep=T)


def _flux():
    config = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8))
    return config, dict(hidden_states=torch.randn(1, 6, 4), encoder_hidden_states=torch.randn(1, 3, 16),
                        pooled_projections=torch.randn(1, 12), timestep=T / 1000, img_ids=torch.randn(6, 3),
                        txt_ids=torch.zeros(3, 3))


def _chroma():
    config = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 8), approximator_num_channels=8,
                  approximator_hidden_dim=16, approximator_layers=1)
    return config, dict(hidden_states=torch.randn(1, 6, 4), encoder_hidden_states=torch.randn(1, 3, 16),
                        timestep=T / 1000, img_ids=torch.randn(6, 3), txt_ids=torch.zeros(3, 3))


def _flux2():
    config = dict(patch_size=1, in_channels=4, num_layers=1, num_single_layers=2, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=16, timestep_guidance_channels=16,
                  axes_dims_rope=(4, 4, 4, 4))
    return config, dict(hidden_states=torch.randn(1, 6, 4), encoder_hidden_states=torch.randn(1, 3, 16),
                        timestep=T / 1000, img_ids=torch.randn(1, 6, 4), txt_ids=torch.zeros(1, 3, 4), guidance=T)


def _sana():
    config = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
                  num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=12,
                  sample_size=6)
    return config, dict(hidden_states=torch.randn(1, 4, 6, 6), encoder_hidden_states=torch.randn(1, 3, 12), timestep=T)


def _cogvideox():
    config = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8,
                  text_embed_dim=12, num_layers=2, sample_width=6, sample_height=4, sample_frames=9,
                  max_text_seq_length=3)
    return config, dict(hidden_states=torch.randn(1, 3, 4, 4, 6), encoder_hidden_states=torch.randn(1, 3, 12),
                        timestep=T)


def _wan():
    config = dict(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=12,
                  freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32)
    return config, dict(hidden_states=torch.randn(1, 4, 2, 4, 6), timestep=T,
                        encoder_hidden_states=torch.randn(1, 3, 12))


def _hunyuan_dit():
    config = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, sample_size=6,
                  hidden_size=16, num_layers=4, cross_attention_dim=12, cross_attention_dim_t5=16,
                  pooled_projection_dim=8, text_len=3, text_len_t5=4, use_style_cond_and_image_meta_size=False)
    rotary = torch.randn(9, 8)
    return config, dict(hidden_states=torch.randn(1, 4, 6, 6), timestep=T, encoder_hidden_states=torch.randn(1, 3, 12),
                        text_embedding_mask=torch.ones(1, 3), encoder_hidden_states_t5=torch.randn(1, 4, 16),
                        text_embedding_mask_t5=torch.ones(1, 4), image_rotary_emb=(rotary.cos(), rotary.sin()))


def _ltx():
    config = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, cross_attention_dim=24,
                  num_layers=2, caption_channels=12)
    return config, dict(hidden_states=torch.randn(1, 12, 4), encoder_hidden_states=torch.randn(1, 3, 12), timestep=T,
                        encoder_attention_mask=torch.ones(1, 3), num_frames=2, height=2, width=3)


def _aura_flow():
    config = dict(sample_size=6, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
                  attention_head_dim=8, num_attention_heads=2, joint_attention_dim=12, caption_projection_dim=16,
                  out_channels=4, pos_embed_max_size=9)
    return config, dict(hidden_states=torch.randn(1, 4, 6, 6), encoder_hidden_states=torch.randn(1, 3, 12),
                        timestep=T / 1000)


def _lumina2():
    config = dict(sample_size=6, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
                  num_attention_heads=3, num_kv_heads=1, multiple_of=8, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32),
                  cap_feat_dim=12)
    return config, dict(hidden_states=torch.randn(1, 4, 6, 6), timestep=T / 1000,
                        encoder_hidden_states=torch.randn(1, 3, 12),
                        encoder_attention_mask=torch.ones(1, 3, dtype=torch.bool))


def _mochi():
    config = dict(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
                  in_channels=4, text_embed_dim=16, time_embed_dim=8, max_sequence_length=3)
    return config, dict(hidden_states=torch.randn(1, 4, 2, 4, 6), encoder_hidden_states=torch.randn(1, 3, 16),
                        timestep=T, encoder_attention_mask=torch.ones(1, 3, dtype=torch.bool))


def _hunyuan_video():
    config = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
                  num_single_layers=1, num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10,
                  rope_axes_dim=(2, 2, 4))
    return config, dict(hidden_states=torch.randn(1, 4, 2, 4, 6), timestep=T,
                        encoder_hidden_states=torch.randn(1, 3, 12),
                        encoder_attention_mask=torch.ones(1, 3), pooled_projections=torch.randn(1, 10), guidance=T)


def _qwen_image():
    config = dict(patch_size=2, in_channels=8, out_channels=2, num_layers=2, attention_head_dim=16,
                  num_attention_heads=2, joint_attention_dim=12, axes_dims_rope=(4, 6, 6))
    return config, dict(hidden_states=torch.randn(1, 6, 8), encoder_hidden_states=torch.randn(1, 3, 12),
                        encoder_hidden_states_mask=torch.ones(1, 3, dtype=torch.bool), timestep=T / 1000,
                        img_shapes=[[(1, 2, 3)]])


def _cogview4():
    config = dict(patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
                  num_attention_heads=2, text_embed_dim=12, time_embed_dim=8, condition_dim=8, pos_embed_max_size=8,
                  sample_size=8, rope_axes_dim=(8, 8))
    size = torch.tensor([[64, 64]])
    return config, dict(hidden_states=torch.randn(1, 4, 4, 6), encoder_hidden_states=torch.randn(1, 3, 12), timestep=T,
                        original_size=size, target_size=size, crop_coords=torch.zeros(1, 2, dtype=torch.long))


def _latte():
    config = dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
                  cross_attention_dim=16, sample_size=6, patch_size=2, activation_fn="gelu-approximate",
                  num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
                  caption_channels=12, video_length=2)
    return config, dict(hidden_states=torch.randn(1, 4, 2, 6, 6), timestep=T,
                        encoder_hidden_states=torch.randn(1, 3, 12))


def _z_image():
    config = dict(in_channels=4, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=12,
                  axes_dims=[4, 6, 6], axes_lens=[128, 32, 32])
    return config, dict(x=[torch.randn(4, 1, 4, 6)], t=T / 1000, cap_feats=[torch.randn(3, 12)], return_dict=False)


def _prx():
    config = dict(in_channels=4, patch_size=2, context_in_dim=12, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=2,
                  axes_dim=[4, 4])
    return config, dict(hidden_states=torch.randn(1, 4, 4, 6), timestep=T / 1000,
                        encoder_hidden_states=torch.randn(1, 3, 12))


MODELS = {"SD3Transformer2DModel": _sd3, "FluxTransformer2DModel": _flux, "Flux2Transformer2DModel": _flux2,
          "ChromaTransformer2DModel": _chroma, "SanaTransformer2DModel": _sana,
          "CogVideoXTransformer3DModel": _cogvideox, "CogView4Transformer2DModel": _cogview4,
          "WanTransformer3DModel": _wan, "HunyuanDiT2DModel": _hunyuan_dit,
          "HunyuanVideoTransformer3DModel": _hunyuan_video, "LTXVideoTransformer3DModel": _ltx,
          "AuraFlowTransformer2DModel": _aura_flow, "Lumina2Transformer2DModel": _lumina2,
          "MochiTransformer3DModel": _mochi, "QwenImageTransformer2DModel": _qwen_image,
          "LatteTransformer3DModel": _latte, "ZImageTransformer2DModel": _z_image, "PRXTransformer2DModel": _prx}


def make(name: str):
    """(transformer in evaluation mode with random weights, arguments of one forward)."""
    torch.manual_seed(0)
    config, arguments = MODELS[name]()
    transformer = getattr(diffusers, name)(**config).eval()
    for parameter in transformer.parameters():  # diffusers starts some of them at zero
        torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5)
    return transformer, arguments


def arguments_at(arguments: dict, s: int) -> dict:
    """The arguments of step s: other latents."""
    name = next(iter(arguments))
    noise = torch.Generator().manual_seed(s)
    first = arguments[name]
    step = [t + torch.randn(t.shape, generator=noise) for t in (first if isinstance(first, list) else [first])]
    return arguments | {name: step if isinstance(first, list) else step[0]}


def values(output) -> torch.Tensor:
    """What a forward returned, as one flat tensor."""
    sample = output[0]
    return torch.cat([t.flatten() for t in sample]) if isinstance(sample, list) else sample.flatten()


def random_row(K, seed):
    """A random hard row that computes some and reuses some."""
    rng = random.Random(seed)
    computed = rng.sample(range(K), rng.randint(1, K - 1))
    return tuple(k in computed for k in range(K))


def state(transformer):
    return {name: sorted(vars(module)) + [len(module._forward_hooks)] for name, module in transformer.named_modules()}

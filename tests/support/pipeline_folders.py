"""Small pipelines with random weights, saved as folders in diffusers' own format."""

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def random_model(cls, config):
    """A small transformer of the class, its matrices drawn such that every branch matters."""
    torch.manual_seed(0)
    transformer = cls(**dict(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                     num_layers=2, patch_size=2) | config)
    with torch.no_grad():
        for p in transformer.parameters():
            if p.dim() > 1:
                p.normal_(0, p.shape[-1] ** -0.5)
    return transformer


def small_vae(**config):
    torch.manual_seed(0)
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                         **config)


def t5(width: int) -> tuple[T5Tokenizer, T5EncoderModel]:
    torch.manual_seed(0)  # or its weights would be of what ran before
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(letter, -2.0) for letter in f"▁{LETTERS}"]
    encoder = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=width, d_kv=6, d_ff=16, num_layers=1,
                                      num_heads=2)).eval()
    return T5Tokenizer(vocab=vocabulary, extra_ids=0), encoder


def clip(width: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    torch.manual_seed(0)
    tokens = [f"{letter}{end}" for letter in LETTERS for end in ("", "</w>")] + ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
    encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1)).eval()
    return tokenizer, encoder


def save_pixart(folder, **config):
    config = dict(sample_size=8, cross_attention_dim=16, caption_channels=12) | config
    pipe = PixArtAlphaPipeline(*t5(12), small_vae(), random_model(PixArtTransformer2DModel, config),
                               DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder)
    return folder


def save_flux(folder):
    config = dict(in_channels=16, out_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
                  patch_size=1, joint_attention_dim=16, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
                  guidance_embeds=True)
    (tokenizer, encoder), (tokenizer_2, encoder_2) = clip(12), t5(16)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), small_vae(shift_factor=0.0),
                        encoder, tokenizer, encoder_2, tokenizer_2, random_model(FluxTransformer2DModel, config))
    pipe.save_pretrained(folder)
    return folder

"""Small pipelines with random weights, saved as folders in diffusers' own format."""

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel, T5Tokenizer


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


def small_vae():
    return AutoencoderKL(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=4, layers_per_block=1,
                         down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)


def save_pixart(folder, **config):
    vocabulary = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocabulary += [(letter, -2.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    tokenizer = T5Tokenizer(vocab=vocabulary, extra_ids=0)
    encoder = T5EncoderModel(T5Config(vocab_size=len(vocabulary), d_model=12, d_kv=6, d_ff=16, num_layers=1,
                                      num_heads=2)).eval()
    config = dict(sample_size=8, cross_attention_dim=16, caption_channels=12) | config
    pipe = PixArtAlphaPipeline(tokenizer, encoder, small_vae(), random_model(PixArtTransformer2DModel, config),
                               DPMSolverMultistepScheduler())
    pipe.save_pretrained(folder)
    return folder

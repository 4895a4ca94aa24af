"""The bundled model as diffusers' `DiTPipeline`: trained weights, on which every cache of a pipeline can be put."""

from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import Tensor

import harmonica_dit
from bench.bench_caches import Latents
from harmonica_dit.fashion import FASHION
from harmonica_dit.models import DiT

NO_LABEL = 1000  # what DiTPipeline gives for none, whatever the model's number of classes


def fashion_pipe(transformer: DiTTransformer2DModel | None = None) -> DiTPipeline:
    """With DDIM, on the betas of the training. transformer: one that is made already."""
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, clip_sample=False)
    pipe = DiTPipeline(transformer or fashion_transformer(), Latents(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def fashion_transformer() -> DiTTransformer2DModel:
    """The bundled model, but for rounding: its labels, and NO_LABEL."""
    config = FASHION
    transformer = DiTTransformer2DModel(
        num_attention_heads=config["num_heads"], attention_head_dim=config["hidden_size"] // config["num_heads"],
        in_channels=config["in_channels"], out_channels=config["in_channels"], num_layers=config["depth"],
        sample_size=config["input_size"], patch_size=config["patch_size"], num_embeds_ada_norm=NO_LABEL, norm_eps=1e-6)
    net = harmonica_dit.load("fashion-dit")
    transformer.load_state_dict(converted(net))
    transformer.pos_embed.pos_embed.copy_(net.pos_embed)  # a buffer that is in no file
    for block in transformer.transformer_blocks:
        # diffusers spaces the timestep's 128 frequencies over 127 intervals, the model was trained with 128
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    return transformer.eval().requires_grad_(False)


def converted(net: DiT) -> dict[str, Tensor]:
    """The model's weights by diffusers' names. Each of diffusers' blocks has its own embedders."""
    weights = net.state_dict()

    def named(theirs: str, ours: str) -> dict[str, Tensor]:
        return {f"{theirs}.{part}": weights[f"{ours}.{part}"] for part in ("weight", "bias")}

    labels = weights["y_embedder.embedding_table.weight"]
    table = labels.new_zeros(NO_LABEL + 1, labels.shape[1])
    table[: len(labels) - 1], table[NO_LABEL] = labels[:-1], labels[-1]
    found = named("pos_embed.proj", "x_embedder.proj") | named("proj_out_2", "final_layer.linear")
    found |= named("proj_out_1", "final_layer.adaLN_modulation.1")
    for i in range(len(net.blocks)):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        for n, layer in ((1, 0), (2, 2)):
            found |= named(f"{theirs}.norm1.emb.timestep_embedder.linear_{n}", f"t_embedder.mlp.{layer}")
        found[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
        found |= named(f"{theirs}.norm1.linear", f"{ours}.adaLN_modulation.1")
        found |= named(f"{theirs}.attn1.to_out.0", f"{ours}.attn.proj")
        found |= named(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.fc1") | named(f"{theirs}.ff.net.2", f"{ours}.mlp.fc2")
        for part in ("weight", "bias"):
            for name, values in zip("qkv", weights[f"{ours}.attn.qkv.{part}"].chunk(3)):
                found[f"{theirs}.attn1.to_{name}.{part}"] = values
    return found

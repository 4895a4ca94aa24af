"""Reads routers trained by the published code of Learning-to-Cache and HarmoniCa. No code in their files is run."""

import argparse
import os

import torch
from torch import Tensor

from harmonica_dit.flops import Flops, count_flops
from harmonica_dit.load import read_checkpoint
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from harmonica_dit.router import ALWAYS, Router
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.validate import describe, shorten

KINDS = ("learning-to-cache", "harmonica")


def load_published_router(path: str | os.PathLike, kind: str = "learning-to-cache", *, net=None,
                          threshold: float = 0.1) -> Router:
    """Reads the `.pt` file of a router that published code trained for DDIM sampling of a DiT.

    Args:
        kind: which code wrote the file. "harmonica": every row is taken as it is. "learning-to-cache": the file's odd
            rows, the noisiest among them, compute everything, as in its sampler; only the even rows were trained.
        net: the model for which the router is made: a denoiser, or diffusers' `DiTTransformer2DModel`. The router takes
            its branch names and FLOPs. None: the DiT of facebookresearch/DiT that the file names, or DiT-XL/2 at 256
            pixels if it names none.
        threshold: τ.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a whole one of this kind, or is for another model; the message says what was
            expected.

    Source: Learning-to-Cache (Ma et al., NeurIPS 2024, arXiv 2406.01733); HarmoniCa (Huang et al., ICML 2025).
    """
    return Router(**_arguments(path, kind, net), threshold=threshold)


def _arguments(path: str | os.PathLike, kind: str, net) -> dict:
    """The arguments of the `Router` that the file holds.

    The file is a dict. Its "routers" maps "{i}.prob" to the logits [K] of DDIM's i-th timestep in rising order, so
    i = T-1 is the noisiest. Entry 2·b is block b's attention, entry 2·b+1 its feed-forward.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}, expected one of {', '.join(KINDS)}")
    content = read_checkpoint(path)
    made_with = content.get("args") if isinstance(content, dict) else None
    made_with = vars(made_with) if isinstance(made_with, argparse.Namespace) else {}
    if isinstance(made_with.get("image_size"), Tensor):
        raise ValueError(f"{path}: image_size: got a tensor, expected 256 or 512")
    rows = _rows(path, content)
    T, K = len(rows), rows[0].numel() if isinstance(rows[0], Tensor) else 0
    if net is None:
        model, branches, flops = _model(path, K, made_with)
    else:
        net = net if hasattr(net, "branch_names") else adapt(net)
        model, branches, flops = net.name, tuple(net.branch_names), None  # counted last: it runs the model
    if K != len(branches):
        raise ValueError(f"{path}: its rows have {K} entries, the model {model!r} has {len(branches)} branches")
    for i, row in enumerate(rows):
        plain = isinstance(row, Tensor) and row.layout == torch.strided and row.device.type == "cpu"
        if not plain or row.dtype != torch.float32 or row.shape != (K,) or not row.isfinite().all():
            raise ValueError(f"{path}: {i}.prob: got {describe(row)}, expected {K} finite float32 logits")
    logits = torch.stack(rows).flip(0)
    if kind == "learning-to-cache":
        if T % 2:
            raise ValueError(f"{path}: holds {T} rows; Learning-to-Cache trains every second one and needs an even "
                             "number")
        logits[::2] = ALWAYS  # its sampler computes everything at odd i, whatever the file holds there
    timesteps = tuple(t.item() for t in make_scheduler("ddim", T).timesteps)
    size = made_with.get("image_size")
    return dict(logits=logits, branches=branches, flops=flops or _flops(net), timesteps=timesteps, model=model,
                guidance=None, resolution=(size // 8, size // 8) if type(size) is int and size in (256, 512) else None,
                architecture=getattr(net, "architecture", None))


def _rows(path: str | os.PathLike, content) -> list:
    """The T entries "{i}.prob" of the file, i from 0."""
    routers = content.get("routers") if isinstance(content, dict) else None
    if not isinstance(routers, dict):
        raise ValueError(f"{path}: expected a dict with \"routers\", as the published code saves it")
    T = len(routers)
    missing = [f"{i}.prob" for i in range(T) if f"{i}.prob" not in routers]
    if missing or not 2 <= T <= 1000:
        raise ValueError(f"{path}: expected 2 to 1000 rows 0.prob, 1.prob, … without a gap; got {T} entries" + (
            f", {missing[0]} is missing" if missing else ""))
    return [routers[f"{i}.prob"] for i in range(T)]


def _model(path: str | os.PathLike, K: int, made_with: dict) -> tuple[str, tuple[str, ...], Flops]:
    """Name, branches and FLOPs of the model in the file's settings; by default of DiT-XL/2 at 256 pixels."""
    name, image_size = made_with.get("model", "DiT-XL/2"), made_with.get("image_size", 256)
    if not isinstance(name, str) or type(image_size) is not int or name not in CONFIGS or image_size not in (256, 512):
        found = " at ".join(shorten(one) if type(one) in (str, int) else describe(one) for one in (name, image_size))
        raise ValueError(f"{path}: was made for the model {found} pixels, which is not known here; pass it as net=")
    config = CONFIGS[name] | dict(input_size=image_size // 8)
    if K != 2 * config["depth"]:
        raise ValueError(f"{path}: its rows have {K} entries, {name} has {2 * config['depth']} branches; pass the "
                         "model that it was made for as net=")
    return name, *_branches_and_flops(config)


def _flops(net) -> Flops:
    """FLOPs of a denoiser, or of an adapter of diffusers' DiT."""
    if hasattr(net, "sample_shape"):
        return count_flops(net)
    transformer = net.transformer
    side, parameter = transformer.config.sample_size, next(transformer.parameters())
    x = torch.zeros(1, transformer.config.in_channels, side, side, dtype=parameter.dtype, device=parameter.device)
    zero = torch.zeros(1, dtype=torch.long, device=parameter.device)
    return GenericAdapter(transformer, net.branch_names).trace(x, timestep=zero, class_labels=zero)


def _branches_and_flops(config: dict) -> tuple[tuple[str, ...], Flops]:
    """Branch names and FLOPs of a DiT of `config`.

    All blocks cost the same. So they are counted in models of one and two blocks, and the whole one needs no memory.
    """
    one, two = (count_flops(_empty(config | dict(depth=depth))) for depth in (1, 2))
    with torch.device("meta"):
        branches = DiT(**config).branch_names
    depth = config["depth"]
    return branches, Flops(one.branches * depth, one.fixed + (depth - 1) * (two.fixed - one.fixed))


def _empty(config: dict) -> DiT:
    with torch.device("meta"):
        net = DiT(**config)
    return net.to_empty(device="cpu")

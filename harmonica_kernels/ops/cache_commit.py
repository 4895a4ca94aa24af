"""Renew a cache entry if the score exceeds the threshold; on CUDA without waiting for the score."""

import torch
from torch import Tensor

from . import reference
from ._arguments import Arguments, Dense, refusal, refuse_one_place
from ._library import library


def cache_commit(latest: Tensor, o: Tensor, r: Tensor, threshold: float, *, previous: Tensor | None = None) -> None:
    """`latest ← o` if r > threshold, in place; with `previous`, `previous ← latest` before that.

    latest, previous, o: [B, N, D], of any storage dtype; previous has latest's. r: one element on their device,
    compared in float64, as Python would compare it. On the CPU this is plain torch.

    Raises ValueError (shapes, overlap, devices, threshold), TypeError (dtypes), NotImplementedError (neither CPU nor
    CUDA), and RuntimeError if a gradient is asked for: a cache entry has none, so detach o.
    """
    if not threshold >= 0:
        raise ValueError(f"cache_commit: threshold must be at least 0, got {threshold}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (latest, previous, o)):
        raise RuntimeError("cache_commit gives no gradients: detach o, or call it under torch.no_grad()")
    torch.ops.harmonica.cache_commit.default(latest, previous, o, r.detach(), threshold)


library.define("cache_commit(Tensor(a!) latest, Tensor(b!)? previous, Tensor o, Tensor r, float threshold) -> ()")


def _pack(kind: type[Arguments], latest, previous, o, r, threshold) -> tuple:
    pack = kind("cache_commit", latest)
    packed = (pack.activation(latest, "latest", out=True), pack.activation(previous, "previous", out=True),
              pack.activation(o, "o"), pack.scalars(r, "r"), threshold)
    if previous is not None and previous.dtype != latest.dtype:
        raise TypeError(f"cache_commit: previous is {previous.dtype}, expected {latest.dtype} like latest")
    return pack, packed


def _cpu(latest, previous, *rest) -> None:
    _pack(Arguments, latest, previous, *rest)
    for name, t in (("latest", latest), ("previous", previous)):
        if t is not None:
            refuse_one_place("cache_commit", t, name)
    renewed, moved = reference.cache_commit(latest, previous, *rest)
    if moved is not None:
        previous.copy_(moved)
    latest.copy_(renewed)


def _cuda(latest, previous, *rest) -> None:
    from .. import triton_kernels

    pack, packed = _pack(Dense, latest, previous, *rest)
    pack.refuse_overlap()
    triton_kernels.cache_commit(*packed)
    pack.finish()
    torch.autograd.graph.increment_version([t for t in (latest, previous) if t is not None])


def _fake(*arguments) -> None:
    _pack(Arguments, *arguments)


library.impl("cache_commit", _cpu, "CPU")
library.impl("cache_commit", _cuda, "CUDA")
library.impl("cache_commit", refusal("cache_commit"), "CompositeExplicitAutograd")
torch.library.register_fake("harmonica::cache_commit", _fake, lib=library)

"""Finds the blocks of a diffusers transformer, and the branches in them, by the names of its modules."""

import re
from collections.abc import Iterator

from torch import nn

BRANCH = re.compile(r"attn|attention|(^|_)(ff|ffn|mlp|feed_forward)(_|$)")
NOT_A_BRANCH = re.compile(r"norm|adaln|modulation|embed|drop")


def check_is_module(transformer) -> None:
    """Raises TypeError for what is no module; a pipeline is told where its transformer is."""
    if not isinstance(transformer, nn.Module):
        inside = "; pass pipe.transformer" if isinstance(getattr(transformer, "transformer", None), nn.Module) else ""
        raise TypeError(f"transformer: got {type(transformer).__name__}, expected a diffusers transformer{inside}")


def find_branches(transformer: nn.Module) -> Iterator[str]:
    """Names of the attention and feed-forward modules in the transformer's lists of blocks, in order of definition."""
    for name, block in listed(transformer):
        yield from _find_inside(block, name)


def find_blocks(transformer: nn.Module) -> list[str]:
    """Names of the blocks that hold branches, in order of definition."""
    return [name for name, block in listed(transformer) if any(_find_inside(block, name))]


def listed(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules in the transformer's lists of blocks."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{i}", block) for i, block in enumerate(child))


def _find_inside(block: nn.Module, prefix: str) -> Iterator[str]:
    if "_orig_mod" in block._modules:  # torch.compile's wrapper, which passes the attributes of what is inside on
        block, prefix = block._orig_mod, f"{prefix}._orig_mod"
    if is_single_stream(block):
        yield f"{prefix}.proj_out"
        return
    for name, child in block.named_children():
        if NOT_A_BRANCH.search(name):
            continue
        inner = next(child.children(), None)  # None in a bare linear layer or activation
        if BRANCH.search(name) and inner is not None and not isinstance(child, nn.ModuleList):
            yield f"{prefix}.{name}"
        else:
            yield from _find_inside(child, f"{prefix}.{name}")


def is_single_stream(block: nn.Module) -> bool:
    return all(hasattr(block, part) for part in ("attn", "proj_mlp", "proj_out"))


def feeders(transformer: nn.Module, name: str) -> list[str]:
    """Names of the modules whose outputs go into the branch `name` and nowhere else."""
    prefix, _, part = name.rpartition(".")
    if part != "proj_out" or not is_single_stream(transformer.get_submodule(prefix)):
        return []
    return [f"{prefix}.attn", f"{prefix}.proj_mlp"]

"""Which branches make up a block, for methods that decide on blocks."""

from collections.abc import Sequence
from itertools import groupby


def block_sizes(names: Sequence[str]) -> list[int]:
    """How many branches each block has, in execution order.

    names: the K branches'. Those in a row that differ in the last part alone ("blocks.0.attn", "blocks.0.mlp") are a
    block.
    """
    return [len(list(branches)) for _, branches in groupby(names, key=lambda name: name.rpartition(".")[0])]

"""The run: the branch outputs that are added to a transformer's residual stream between two norms."""

from typing import NamedTuple

from torch import Tensor


class Term(NamedTuple):
    """One branch's share in a run, `gate · o` with `o = (1 + e)·latest - e·previous`. The ops take the forecast weights
    e beside the run.

    latest: [B, N, D], the newest output of the branch: just computed, or cached.
    previous: [B, N, D], the computed output before it; needed only if e is not 0.
    gate: [B or 1, D] residual gate of the modulation, or None for 1.
    """

    latest: Tensor
    previous: Tensor | None = None
    gate: Tensor | None = None

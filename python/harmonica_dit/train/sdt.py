"""Step-wise denoising training (SDT): one trajectory, one update of each row."""

from typing import NamedTuple

import torch
from torch import Tensor

from harmonica_dit.router import Router

from .student import Student


class Measurements(NamedTuple):
    """What one trajectory measures, for the rows s = 1..T-1."""

    losses: Tensor  # [T-1], L_s
    errors: Tensor  # [T-1], mean((ε - ε*)²)
    values: Tensor  # [T-1, K], the value of computing an entry, at r = τ; see `Steering`


@torch.no_grad()
def train_trajectory(router: Router, student: Student, optimizer: torch.optim.Optimizer, importance: Tensor,
                     costs: Tensor, beta: float | None, *, channels: int | None = None,
                     threshold: float = 0.1) -> Measurements:
    """Walks from noise to image. Step s ≥ 1 updates row s by the loss L_s = λ_s·mean((ε - ε*)²) + β·Σ_k c_k·r[s,k].

    The scheduler's step takes the student's ε, blended by the row before its update, and detached. Step 0 computes and
    stores everything.

    Args:
        student: at step 0. optimizer: of the rows, one Parameter each; it moves only the row that has a gradient.
        importance: λ [T]. costs: c [K], above 0.
        beta: None only measures and updates nothing.
        channels: how many leading output channels are compared, None for all.
        threshold: the τ of `values`.

    Source: HarmoniCa (Huang et al., ICML 2025), section 3.2 (SDT) and 3.3 (IEPO).
    """
    student.advance(student.predict())
    losses, errors, values = [], [], []
    for s in range(1, router.steps):
        target = student.teacher()
        with torch.enable_grad():
            r = router.score(s)
            # from scores of its own: `learn` runs a backward through r, and that frees r's graph
            cost = (costs * router.score(s)).sum() * (beta or 0.0)
        output, error, gradient = student.learn(r, target, importance[s], channels)
        values.append(-gradient / costs * (1 - threshold) / (1 - r))
        cost.backward()
        if beta is not None:
            optimizer.step()
            router.clamp_(s)
        optimizer.zero_grad(set_to_none=True)
        student.advance(output)
        losses.append(importance[s] * error + cost)
        errors.append(error)
    return Measurements(torch.stack(losses), torch.stack(errors), torch.stack(values))

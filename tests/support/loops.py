"""Random small loops, and their trajectories step by step through `cached_forward`: what a gated one has to equal."""

import random

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_kernels.graphs.gated import DecisionTables, Loop
from harmonica_kernels.ops import guided_step


class Trajectory:
    """A trajectory of a loop with labels [n], as `Gated` takes it."""

    def __init__(self, steps: int, branches: int, n: int = 2, tokens: int = 3, width: int = 16,
                 dtype: torch.dtype = torch.float32, plain: bool = False):
        self.steps, self.K, self.D, self.plain = steps, branches, width, plain
        self.labels = torch.randint(7, (n,))
        self.guidance, self.channels = random.choice(((1.0, None), (1.5, None), (2.0, 1)))
        B = n if self.guidance == 1 else 2 * n
        self.shape = (n, 2, tokens, width // 2)
        self.table = torch.randn(steps, 7, 3 * branches + 2, width, dtype=dtype) * 0.3
        self.into, self.out = (torch.randn(width, width, dtype=dtype) / width**0.5 for _ in range(2))
        self.updates = torch.stack([torch.rand(steps) * 0.2 + 0.8, torch.randn(steps) * 0.1], 1)
        self.weights = torch.randn(branches, width, width, dtype=dtype) / width**0.5
        self.kinds = [(random.random() < 0.5, self._some(0.8), self._some(0.8), random.choice((1e-6, 1e-5)))
                      for _ in range(branches)]
        self.rows = [(self._some(0.9), self._some(0.9), gate) for _, _, gate, _ in self.kinds]
        self.B, self.eps = B, random.choice((1e-6, 1e-5))

    def _some(self, share: float) -> bool:
        return self.plain or random.random() < share

    @property
    def branches(self) -> list[hk.Branch]:
        return [self._branch(k) for k in range(self.K)]

    def _branch(self, k: int) -> hk.Branch:
        has_out, norm, gate, eps = self.kinds[k]

        def body(h: Tensor, context) -> Tensor:
            return torch.tanh(h @ self.weights[k]) + context * k

        def body_out(h: Tensor, context, out: Tensor) -> None:
            out.copy_(body(h, context))

        return hk.Branch(body, body_out if has_out else None, norm, gate, eps)

    def to(self, device: torch.device) -> "Trajectory":
        """The same on another device."""
        other = self._relabelled(self.labels.to(device))
        for name in ("table", "into", "out", "updates", "weights"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    # What `Gated` asks for.

    def graph_parts(self):
        return self, (self.labels,), self._relabelled

    def _relabelled(self, labels: Tensor) -> "Trajectory":
        other = object.__new__(Trajectory)
        other.__dict__ = self.__dict__ | {"labels": labels}
        return other

    def start(self, noise: Tensor) -> Tensor:
        return noise * 1.5

    def loop(self) -> Loop:
        return Loop(self.branches, self.modulation, self.embed, self.head, self.updates, self.guidance, self.channels,
                    context=lambda: 0.01, eps=self.eps)

    def modulation(self) -> hk.Modulation:
        """[T, B, D] views, as chunks of one matrix are; the unconditional rows are those of label 0."""
        labels = self.labels if self.B == len(self.labels) else torch.cat([self.labels, torch.zeros_like(self.labels)])
        rows = self.table[:, labels].unbind(2)
        shift, scale, gate = rows[:self.K + 1], rows[self.K + 1:2 * self.K + 2], rows[2 * self.K + 2:]
        keep = lambda rows, which: [row if k == self.K or self.rows[k][which] else None for k, row in enumerate(rows)]
        return hk.Modulation(keep(shift, 0), keep(scale, 1), keep(gate, 2))

    def embed(self, x: Tensor) -> Tensor:
        tokens = x.to(self.into.dtype).transpose(1, 2).flatten(2) @ self.into
        return tokens if self.B == len(x) else torch.cat([tokens, tokens])

    def head(self, y: Tensor) -> Tensor:
        return (y @ self.out).unflatten(2, (2, -1)).transpose(1, 2)

    # Step by step.

    @torch.no_grad()
    def run(self, noise: Tensor, decide) -> Tensor:
        """decide(s, h) -> (row, forecasts) of step s, given branch 0's input."""
        x, mod, n = self.start(noise), self.modulation(), len(noise)
        cache = hk.FeatureCache(history=2)
        for s in range(self.steps):
            rows = hk.Modulation(*([None if row is None else row[s] for row in part] for part in mod))
            tokens = self.embed(x)
            row, weights = decide(s, tokens, rows)
            y = hk.cached_forward(self.branches, tokens, rows, row=row, forecast_weights=weights, cache=cache,
                                  context=0.01, eps=self.eps)
            output = self.head(y)
            x = guided_step(x, output[:n], output[n:] if len(output) > n else None, guidance=self.guidance,
                            channels=self.channels, table=self.updates, step=torch.tensor([s]))
        return x


class Table:
    """Scores and extrapolation, as `Gated.load` takes them."""

    def __init__(self, scores: Tensor, extrapolation: Tensor | None = None):
        self.scores, self.extrapolation = scores, extrapolation

    def decision_tables(self):
        return DecisionTables(self.scores, self.extrapolation)

    def rows(self, threshold: float) -> tuple[Tensor, list]:
        """Compute table and forecast weights at a threshold, from the definitions in docs/design.md, entry by entry."""
        T, K = self.scores.shape
        compute = self.scores.double() > threshold
        compute[0] = True
        weights = torch.zeros(T, K)
        for s in range(1, T):
            for k in range(K):
                steps = [i for i in range(s) if compute[i, k]]
                if not compute[s, k] and len(steps) > 1 and self.extrapolation is not None:
                    ratio = torch.tensor(float(s - steps[-1])) / float(steps[-1] - steps[-2])
                    weights[s, k] = self.extrapolation[s, k] * ratio
        return compute, weights.tolist()


class Forecasts:
    """Which of T steps are computed, and random weights of the trunk's last H states for all of them."""

    def __init__(self, steps: int, history: int, width: int, dense: float = 0.5):
        self.history = history
        self.compute = [s == 0 or random.random() < dense for s in range(steps)]
        self.weights, kept = [], 0
        for computed in self.compute:
            n = random.randint(0 if computed else 1, min(kept, history)) if kept else 0
            last = random.choice((1, width))
            draw = lambda *shape, n=n: torch.randn(*shape) / (2 * n + 1)
            tokens = draw(n, last) if not computed and random.random() < 0.5 else None
            own = draw(last) if random.random() < 0.5 else None
            plain = computed and random.random() < 0.3
            self.weights.append(None if plain else hk.TrunkWeights(draw(n, last), tokens, own))
            kept += computed

    def decision_tables(self):
        scores = torch.tensor(self.compute).float().log()[:, None]  # 0 and -∞
        return DecisionTables(torch.where(scores == 0, torch.inf, scores), None, self.weights, self.history)


def compile_gated(rule="scores"):
    """A device-gated executor of such trajectories."""
    return hk.compile(Trajectory.run, mode="gated", rule=rule)

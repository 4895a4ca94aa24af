"""SDT and IEPO once more, in plain float64, written from section 3 of docs/design.md: what `train_router` must equal.

Nothing of harmonica is imported. Autograd finds every gradient, and no forward is shared between trajectories.
"""

from itertools import pairwise

import torch

from support.blending_dit import BlendingDiT


class Oracle:
    """A training of T steps by deterministic DDIM; afterwards its attributes are what to compare.

    Args:
        net: a `PlainDiT` in float64. noise: [trajectories, n, C, H, W]. labels: [trajectories, n].
        logits: [T, K], as drawn. flops, fixed: of the K branches, and what no schedule skips.
        compared, guided: how many leading channels are. The other arguments are `train_router`'s, by its names.
    """

    def __init__(self, net, noise, labels, logits, flops, fixed, *, lr, eps, threshold, importance, importance_rows,
                 importance_scale, refresh, extrapolation, costs, compared, halves, guidance, guided, beta=None,
                 target_speedup=None, target_cur=None):
        (T, K), f = logits.shape, torch.tensor(flops).double()
        both = halves == "both" and guidance != 1
        self.dit, self.lr, self.eps, self.beta = BlendingDiT(net, T, threshold, guidance, guided, both), lr, eps, beta
        self.kind, self.hard, self.compared, self.T, self.K = importance, importance_rows == "hard", compared, T, K
        self.learned, start = extrapolation == "learned", extrapolation if isinstance(extrapolation, float) else 0.0
        self.logits = [row.requires_grad_() for row in logits.double().clamp(-5, 5)]
        self.a = [torch.full((K,), start).double().requires_grad_() for _ in range(T)]
        self.c = f / f.mean() if costs == "flops" else torch.ones(K)
        self.w = torch.ones(K) if target_speedup is None else f
        self.b = (T * (f.sum() + fixed) / target_speedup - T * fixed - f.sum() if target_speedup is not None
                  else K * (T * (1 - (target_cur or 0.0)) - 1)) + 1e-9 * self.w.sum()
        self.moments, self.losses, self.errors, self.betas, self.mean_values = {}, [], [], [], 0.0
        self.raw_means = []
        for n, (x, y) in enumerate(zip(noise.double(), labels, strict=True)):
            x = torch.cat([x, x]) if both else x
            if n == 0 or n * T // refresh > (n - 1) * T // refresh:
                self.raw = self.measure(x, y)
                self.importance = self.raw
                if importance_scale == "normalised":
                    self.importance = self.raw / self.raw[1:].mean() if self.raw.any() else torch.ones_like(self.raw)
            self.raw_means.append(self.raw[1:].mean().item())
            values = self.trajectory(x, y)
            if beta is None:
                self.mean_values = self.mean_values + (values - self.mean_values) / min(n + 1, 10)
                self.beta = max(self.cut(self.mean_values), 0.0)
        if beta is None:
            self.dit.tau = self.cut(torch.stack(self.logits)[1:].sigmoid())

    @torch.no_grad()
    def image(self, x, y, rows):
        """The final image, and every step's noise channels, of these T rows of scores."""
        stored, outputs = None, []
        for s in range(self.T):
            output, stored = self.dit.forward(x, y, s, rows[s], self.a[s], stored)
            outputs.append(output[:, : x.shape[1]])
            x = self.dit.advance(x, s, output)
        return x, outputs

    def measure(self, x, y):
        """λ [T]."""
        rows = torch.stack(self.logits).detach().sigmoid()
        rows = (rows > self.dit.tau).double() if self.hard else rows
        rows[0], ones = 1, torch.ones_like(rows)
        if self.kind == "reference":  # row after row is turned on
            images = [self.image(x, y, torch.cat([rows[:s], ones[s:]]))[0] for s in range(1, self.T + 1)]
            found = [mean_square(b - a) for a, b in pairwise(images)]
        else:
            found, (final, outputs) = [], self.image(x, y, rows)
            for s in range(1, self.T):
                image, others = self.image(x, y, torch.cat([rows[:s], ones[:1], rows[s + 1 :]]))
                change, error = mean_square(final - image), mean_square(outputs[s] - others[s])
                found.append(change / error if self.kind == "gain" and error > 0 else change)
        return torch.stack([torch.zeros_like(found[0]), *found])

    def trajectory(self, x, y):
        """Trains on one trajectory; the values of its entries [T-1, K]."""
        ones, losses, errors, values = torch.ones(self.K), [], [], []
        output, stored = self.dit.forward(x, y, 0, ones, self.a[0])
        x = self.dit.advance(x, 0, output)
        for s in range(1, self.T):
            r = self.logits[s].sigmoid()
            output, stored = self.dit.forward(x, y, s, r, self.a[s], stored)
            error = mean_square((output - self.dit.forward(x, y, s, ones, self.a[s])[0])[:, : self.compared])
            loss = self.importance[s] * error + (self.beta or 0.0) * (self.c * r).sum()
            slope = torch.autograd.grad(self.importance[s] * error, r, retain_graph=True)[0]
            values.append(-slope * (1 - self.dit.tau) / (1 - r.detach()) / self.c)
            if self.beta is not None:
                self.update(s, loss)
            losses.append(loss.item())
            errors.append(error.item())
            x = self.dit.advance(x, s, output)
        self.losses.append(sum(losses) / len(losses))
        self.errors.append(sum(errors) / len(errors))
        self.betas.append(self.beta or 0.0)
        return torch.stack(values)

    def update(self, s, loss):
        rows = [self.logits[s], self.a[s]] if self.learned else [self.logits[s]]
        for i, (row, g) in enumerate(zip(rows, torch.autograd.grad(loss, rows, allow_unused=True), strict=True)):
            if g is not None:  # in row 1 nothing is forecast yet
                m, v, count = self.moments.get((i, s), (0.0, 0.0, 0))
                m, v, count = self.moments[i, s] = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2, count + 1
                row.data -= self.lr * m / (1 - 0.9**count) / ((v / (1 - 0.999**count)) ** 0.5 + self.eps)
        self.logits[s].data.clamp_(-5, 5)

    def cut(self, values):
        """The number between the entries [T-1, K] that the budget holds, by falling value, and the others."""
        v, order = values.detach().flatten().sort(descending=True)
        taken = int((self.w.repeat(self.T - 1)[order].cumsum(0) <= self.b).sum())
        if taken == len(v):
            return v[-1].item() / 2
        above = v[v > v[taken]]
        return ((v[taken] + (above[-1] if len(above) else v[taken])) / 2).item()


def mean_square(difference):
    return difference.square().mean()

"""SDT and IEPO once more, in plain float64, written from section 3 of docs/design.md: what `train_router` must equal.

Nothing of harmonica is imported. Autograd finds every gradient, and no forward is shared between trajectories.
"""

from itertools import pairwise

import torch

from plain_dit import modulate


class Oracle:
    """A training of T steps by deterministic DDIM; afterwards its attributes are what to compare.

    Args:
        net: a `PlainDiT` in float64. noise: [trajectories, n, C, H, W]. labels: [trajectories, n].
        logits: [T, K], as drawn. flops, fixed: of the K branches, and what no schedule skips.
        compared, guided: how many leading channels are. The others are called as `train_router` calls them.
    """

    def __init__(self, net, noise, labels, logits, flops, fixed, *, lr, threshold, importance, importance_rows, refresh,
                 extrapolate, costs, compared, guidance, guided, beta=None, target_speedup=None, target_cur=None):
        (T, K), f = logits.shape, torch.tensor(flops).double()
        self.net, self.lr, self.tau, self.beta, self.guidance, self.guided = net, lr, threshold, beta, guidance, guided
        self.kind, self.hard, self.compared, self.T, self.K = importance, importance_rows == "hard", compared, T, K
        self.learned, start = extrapolate == "learned", extrapolate if isinstance(extrapolate, float) else 0.0
        self.logits = [row.requires_grad_() for row in logits.double().clamp(-5, 5)]
        self.a = [torch.full((K,), start).double().requires_grad_() for _ in range(T)]
        self.t = torch.linspace(999, 0, T).double().round().long()
        self.abar = [*torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[self.t].tolist(), 1.0]
        self.c = f / f.mean() if costs == "flops" else torch.ones(K)
        self.w = torch.ones(K) if target_speedup is None else f
        self.b = (T * (f.sum() + fixed) / target_speedup - T * fixed - f.sum() if target_speedup is not None
                  else K * (T * (1 - (target_cur or 0.0)) - 1)) + 1e-9 * self.w.sum()
        self.moments, self.losses, self.errors, self.betas, self.mean_values = {}, [], [], [], 0.0
        for n, (x, y) in enumerate(zip(noise.double(), labels, strict=True)):
            if n == 0 or n * T // refresh > (n - 1) * T // refresh:
                self.importance = self.measured(x, y)
            values = self.trajectory(x, y)
            if beta is None:
                self.mean_values = self.mean_values + (values - self.mean_values) / min(n + 1, 10)
                self.beta = max(self.cut(self.mean_values), 0.0)
        if beta is None:
            self.tau = self.cut(torch.stack(self.logits)[1:].sigmoid())

    def transformer(self, x, y, s, row, stored):
        """The output, and what is stored of each branch from then on: (step, output) pairs, the newest last."""
        condition = self.net.t_embedder(self.t[s].expand(len(y))) + self.net.y_embedder(y)
        x, kept = self.net.x_embedder(x) + self.net.pos_embed, []
        for k, was in enumerate(stored):
            block = self.net.blocks[k // 2]
            norm, body = (block.norm2, block.mlp) if k % 2 else (block.norm1, block.attn)
            shift, scale, gate = block.adaLN_modulation(condition).chunk(2, 1)[k % 2].chunk(3, 1)
            o = body(modulate(norm(x), shift, scale))
            if was:
                (before, previous), (last, latest) = was[-2:] if len(was) > 1 else 2 * was
                e = self.a[s][k] * (s - last) / (last - before) if len(was) > 1 else 0.0
                o = row[k] * o + (1 - row[k]) * ((1 + e) * latest - e * previous)
            kept.append([*was, (s, o.detach())] if row[k] > self.tau else was)
            x = x + gate[:, None] * o
        g, p = self.net.grid, self.net.patch
        x = self.net.final_layer(x, condition).reshape(len(x), g, g, p, p, self.net.out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.net.out, g * p, g * p), kept

    def forward(self, x, y, s, row, stored=None):
        """The guided output, and what is stored; without what was stored before, all has to be computed."""
        stored = [[]] * self.K if stored is None else stored
        if self.guidance == 1:
            return self.transformer(x, y, s, row, stored)
        none = torch.full_like(y, self.net.y_embedder.embedding_table.num_embeddings - 1)
        output, stored = self.transformer(torch.cat([x, x]), torch.cat([y, none]), s, row, stored)
        with_label, without = output.chunk(2)
        guided = without + self.guidance * (with_label - without)
        return torch.cat([guided[:, : self.guided], with_label[:, self.guided :]], 1), stored

    def advance(self, x, s, output):
        now, after, noise = self.abar[s], self.abar[s + 1], output.detach()[:, : x.shape[1]]
        return after**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - after) ** 0.5 * noise

    @torch.no_grad()
    def image(self, x, y, rows):
        """The final image, and every step's noise channels, of these T rows of scores."""
        stored, outputs = None, []
        for s in range(self.T):
            output, stored = self.forward(x, y, s, rows[s], stored)
            outputs.append(output[:, : x.shape[1]])
            x = self.advance(x, s, output)
        return x, outputs

    def measured(self, x, y):
        """λ [T], of mean 1."""
        rows = torch.stack(self.logits).detach().sigmoid()
        rows = (rows > self.tau).double() if self.hard else rows
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
        found = torch.stack([torch.zeros_like(found[0]), *found])
        return found / found[1:].mean() if found.any() else torch.ones_like(found)

    def trajectory(self, x, y):
        """Trains on one trajectory; the values of its entries [T-1, K]."""
        ones, losses, errors, values = torch.ones(self.K), [], [], []
        output, stored = self.forward(x, y, 0, ones)
        x = self.advance(x, 0, output)
        for s in range(1, self.T):
            r = self.logits[s].sigmoid()
            output, stored = self.forward(x, y, s, r, stored)
            error = mean_square((output - self.forward(x, y, s, ones)[0])[:, : self.compared])
            loss = self.importance[s] * error + (self.beta or 0.0) * (self.c * r).sum()
            slope = torch.autograd.grad(self.importance[s] * error, r, retain_graph=True)[0]
            values.append(-slope * (1 - self.tau) / (1 - r.detach()) / self.c)
            if self.beta is not None:
                self.update(s, loss)
            losses.append(loss.item())
            errors.append(error.item())
            x = self.advance(x, s, output)
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
                row.data -= self.lr * m / (1 - 0.9**count) / ((v / (1 - 0.999**count)) ** 0.5 + 1e-16)
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

"""A plain DiT whose branches are blended with stored outputs, under guidance and DDIM: section 3 of docs/design.md.

Plain PyTorch in the dtype of the model; nothing of harmonica is imported.
"""

import torch

from support.plain_dit import modulate


class BlendingDiT:
    """One step of a student.

    Args:
        net: a `PlainDiT` in float64. T: steps. threshold: τ. guidance: its scale. guided: how many leading channels.
        both: x and the output have the unconditional half too, which the transformer is not given.
    """

    def __init__(self, net, T, threshold, guidance, guided, both=False):
        self.net, self.tau, self.guidance, self.guided, self.both = net, threshold, guidance, guided, both
        self.t = torch.linspace(999, 0, T).double().round().long()
        self.abar = [*torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000).double(), 0)[self.t].tolist(), 1.0]

    def transformer(self, x, y, s, row, a, stored):
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
                e = a[k] * (s - last) / (last - before) if len(was) > 1 else 0.0
                o = row[k] * o + (1 - row[k]) * ((1 + e) * latest - e * previous)
            kept.append([*was, (s, o.detach())] if row[k] > self.tau else was)
            x = x + gate[:, None] * o
        g, p = self.net.grid, self.net.patch
        x = self.net.final_layer(x, condition).reshape(len(x), g, g, p, p, self.net.out).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(len(x), self.net.out, g * p, g * p), kept

    def forward(self, x, y, s, row, a, stored=None):
        """The guided output, and what is stored.

        row: scores [K]. a: extrapolation coefficients [K]. stored: None where nothing has been computed before.
        """
        stored = [[]] * len(row) if stored is None else stored
        if self.guidance == 1:
            return self.transformer(x, y, s, row, a, stored)
        x = x[: len(y)]
        none = torch.full_like(y, self.net.y_embedder.embedding_table.num_embeddings - 1)
        output, stored = self.transformer(torch.cat([x, x]), torch.cat([y, none]), s, row, a, stored)
        with_label, without = output.chunk(2)
        guided = without + self.guidance * (with_label - without)
        halves = [torch.cat([guided[:, : self.guided], half[:, self.guided :]], 1) for half in (with_label, without)]
        return torch.cat(halves) if self.both else halves[0], stored

    def advance(self, x, s, output):
        now, after, noise = self.abar[s], self.abar[s + 1], output.detach()[:, : x.shape[1]]
        return after**0.5 * (x - (1 - now) ** 0.5 * noise) / now**0.5 + (1 - after) ** 0.5 * noise

"""A small model for `cached_forward`, and the same forward written out naively."""

import torch
from torch.nn.functional import layer_norm

import harmonica_kernels as hk

EPS = (1e-6, 1e-5)
NORM = (True, True, False, True)  # branch 2 takes x itself, as PixArt's cross-attention does
GATE = (True, True, False, True)
K = 4


class Toy:
    """K branches `tanh(h @ w + context)`, their modulation, and the same forward written out naively."""

    def __init__(self, B=2, N=3, D=8, dtype=torch.float64, out=True):
        self.w = [torch.randn(D, D, dtype=dtype) / D**0.5 for _ in range(K)]
        rows = lambda present: [torch.randn(B, 3 * D, dtype=dtype)[:, D : 2 * D] if p else None for p in present]
        self.mod = hk.Modulation(rows((*NORM, True)), rows((*NORM, True)), rows(GATE))
        self.context = torch.randn(D, dtype=dtype)
        self.x = torch.randn(B, N, D, dtype=dtype)
        self.calls = []
        self.branches = [hk.Branch(self.body(k), self.body_out(k) if out and k % 2 == 0 else None, NORM[k], GATE[k],
                                   EPS[k % 2]) for k in range(K)]

    def body(self, k):
        def body(h, context):
            self.calls.append((k, "body"))
            return torch.tanh(h @ self.w[k] + context)
        return body

    def body_out(self, k):
        def body_out(h, context, out):
            self.calls.append((k, "body_out"))
            out.copy_(torch.tanh(h @ self.w[k] + context))
        return body_out

    def __call__(self, x, **options):
        return hk.cached_forward(self.branches, x, self.mod, context=self.context, **options)

    def through(self, x, first, end):
        """x after the branches first..end-1, all computed; their outputs are in `outputs`."""
        self.outputs = []
        for k in range(first, end):
            h = layer_norm(x, x.shape[-1:], eps=EPS[k % 2]) if NORM[k] else x
            if NORM[k]:
                h = h * (1 + self.mod.scale[k].unsqueeze(1)) + self.mod.shift[k].unsqueeze(1)
            o = torch.tanh(h @ self.w[k] + self.context)
            self.outputs.append(o.detach())
            x = x + (o if self.mod.gate[k] is None else self.mod.gate[k].unsqueeze(1) * o)
        return x

    def naive(self, x, store, row=None, forecast_weights=None, threshold=0.1):
        """`store`: per branch the list of outputs stored so far, newest last; extended here."""
        soft = isinstance(row, torch.Tensor)
        for k in range(K):
            h = layer_norm(x, x.shape[-1:], eps=EPS[k % 2]) if NORM[k] else x
            if NORM[k]:
                h = h * (1 + self.mod.scale[k].unsqueeze(1)) + self.mod.shift[k].unsqueeze(1)
            reuse = None
            if row is not None and (soft or not row[k]):
                reuse = store[k][-1]
                e = 0 if forecast_weights is None else forecast_weights[k]
                if len(store[k]) > 1:
                    reuse = (1 + e) * reuse - e * store[k][-2]
            if reuse is None:
                o = torch.tanh(h @ self.w[k] + self.context)
                store[k].append(o.detach())
            elif soft:
                o = row[k] * torch.tanh(h @ self.w[k] + self.context) + (1 - row[k]) * reuse
                if row[k] > threshold:
                    store[k].append(o.detach())
            else:
                o = reuse
            x = x + (o if self.mod.gate[k] is None else self.mod.gate[k].unsqueeze(1) * o)
        y = layer_norm(x, x.shape[-1:], eps=1e-6)
        return y * (1 + self.mod.scale[K].unsqueeze(1)) + self.mod.shift[K].unsqueeze(1)


def random_rows(steps):
    return [(torch.rand(K) < 0.5).tolist() for _ in range(steps)]

"""A function of tensors and a model of three branches: what executors are tried on."""

import torch

import harmonica_kernels as hk


def double(x, y=0, power=1):
    return (2 * x + y) ** power


class ThreeBranches(torch.nn.Module):
    """Three branches in random weights."""

    def __init__(self, D=8):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(3))
        self.branches = [hk.Branch(lambda h, _, layer=layer: torch.tanh(layer(h)), gate=False)
                         for layer in self.layers]
        self.mod = hk.Modulation([None] * 4, [None] * 4, [None] * 3)

    def forward(self, x, **row):
        return hk.cached_forward(self.branches, x, self.mod, **row)

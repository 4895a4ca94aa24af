"""A toy transformer, some of whose branches cannot be reused."""

from torch import nn


class Half(nn.Module):
    """Halves its input; a branch with something odd about it."""

    def __init__(self, odd=None):
        super().__init__()
        self.inner, self.odd = nn.Sequential(nn.Linear(4, 4)), odd

    def forward(self, x):
        o = self.inner(x) / 2
        return {"odd": o} if self.odd == "output" else o


class Block(nn.Module):
    def __init__(self, odd=None):
        super().__init__()
        self.ff, self.attn, self.odd = Half(), Half(odd), odd

    def forward(self, x):
        if self.odd != "skipped":
            o = self.attn(x)
            x = x + (o["odd"] if self.odd == "output" else o.mul_(2) if self.odd == "in place" else o)
        if self.odd == "twice":
            x = x + self.ff(x)
        return x + self.ff(x)


class Toy(nn.Module):
    def __init__(self, *odd):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, odd))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

"""What several benchmarks measure on: random weights, random schedules, and the plain model as a denoiser."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

import harmonica_dit
from harmonica_dit.fashion import FASHION
from harmonica_dit.flops import Flops
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.schedule import Schedule
from support.plain_dit import PlainDiT


def random_weights(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew, at a scale that keeps activations near 1: none is zero, so no branch is hidden."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        std = 0.3 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        parameter.data.normal_(std=std, generator=generator)
    return model.eval().requires_grad_(False)


def random_dit(name: str, depth: int | None = None) -> tuple[DiT, dict]:
    """A DiT and its configuration. Of the bundled one the weights are its own, and depth is not used."""
    if name == "fashion-dit":
        return harmonica_dit.load(name), FASHION
    torch.manual_seed(0)
    config = CONFIGS[name] | dict(input_size=32, in_channels=4) | ({} if depth is None else dict(depth=depth))
    net = DiT(**config, name=name).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.02)
    return net, config


def random_schedule(branches: Sequence[str], flops: Flops, steps: int, cur: float, seed: int = 0) -> Schedule:
    """Reuses a share `cur` of the T·K entries, to the nearest entry, drawn at random from the rows after the first.

    Raises:
        ValueError: the first row, which has nothing to reuse, leaves fewer entries than that.
    """
    if not 0 <= cur <= (steps - 1) / steps:
        raise ValueError(f"cur: got {cur}, expected 0 to {(steps - 1) / steps:.4g}, for the first of {steps} steps has "
                         "nothing to reuse")
    K = len(branches)
    order = torch.randperm((steps - 1) * K, generator=torch.Generator().manual_seed(seed))
    compute = torch.ones(steps, K, dtype=torch.bool)
    compute[1:].view(-1)[order[: round(cur * steps * K)]] = False
    return Schedule(compute, tuple(branches), flops, origin=f"random, CUR {cur:.1%}")


class Plain(nn.Module):
    """The plain model behind the denoisers' signature, in its weights' dtype; where that is the net's it shares them.

    config: what the net was made with.
    """

    guidance, guidance_channels, scheduler, name = DiT.guidance, DiT.guidance_channels, DiT.scheduler, "plain"

    def __init__(self, net: DiT, dtype: torch.dtype, config: dict):
        super().__init__()
        with torch.device("meta"):
            self.net = PlainDiT(**config).eval().requires_grad_(False)
        self.net.load_state_dict({name: w.to(dtype) for name, w in net.state_dict().items()}, assign=True)
        self.dtype, self.sample_shape, self.num_classes = dtype, net.sample_shape, net.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.net(x.to(self.dtype), t, y)

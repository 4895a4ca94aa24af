"""What the whole-model parts share: the model with random weights, its plain twin, its schedules, its trajectories."""

from pathlib import Path

import torch
from torch import Tensor, nn

from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.schedule import Schedule
from support.plain_dit import PlainDiT

XL = CONFIGS["DiT-XL/2"] | dict(input_size=32, in_channels=4)
TINY = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=2)
LTC = Path(__file__).parents[1] / "data" / "ltc_dit_xl_2_t20.safetensors"
GUIDANCE, GUIDED = 1.5, 3  # Peebles & Xie's: scale, and leading channels


class Plain(nn.Module):
    """The plain model behind the denoisers' signature, in its weights' dtype."""

    guidance, guidance_channels, name = GUIDANCE, GUIDED, "plain"

    def __init__(self, net: DiT, dtype: torch.dtype, config: dict):
        super().__init__()
        with torch.device("meta"):
            self.net = PlainDiT(**config).eval().requires_grad_(False)
        self.net.load_state_dict({name: w.to(dtype) for name, w in net.state_dict().items()}, assign=True)
        self.dtype, self.sample_shape, self.num_classes = dtype, net.sample_shape, net.num_classes

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.net(x.to(self.dtype), t, y)


def steps(tiny: bool) -> int:
    """T."""
    return 4 if tiny else 20


def config(tiny: bool) -> dict:
    return TINY if tiny else XL


def model(tiny: bool, device: torch.device, attention: str = "sdpa") -> DiT:
    """Random weights in bfloat16 under which every branch counts: products keep the size of what they are given, and
    gates and modulation are not zero, as they are before a training."""
    torch.manual_seed(0)
    with device:
        net = DiT(**config(tiny), name="DiT-XL/2", attention=attention)
        for p in net.parameters():
            p.data.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return net.to(torch.bfloat16).eval().requires_grad_(False)


def trajectory(net, images: int, device: torch.device, steps: int) -> Trajectory:
    labels = torch.arange(images, device=device) % net.num_classes
    return Trajectory(net, labels, steps=steps, scheduler="ddim", guidance=GUIDANCE, guidance_channels=GUIDED)


def noise(net, images: int, device: torch.device) -> Tensor:
    return image_noise(0, 0, images, net.sample_shape).to(device)


def schedules(net: DiT, steps: int) -> dict[str, Schedule]:
    """Learning-to-Cache's for T = 20 (Ma et al., 2024), and one that reuses 37.5 % of the entries at random."""
    K, flops = len(net.branches), count_flops(net)
    ltc = Schedule.load(LTC).compute[:steps, :K]  # a dry run has fewer of both
    random = torch.ones(steps, K, dtype=torch.bool)
    order = torch.rand((steps - 1) * K, generator=torch.Generator().manual_seed(0)).argsort()
    random[1:].view(-1)[order[: int(0.375 * steps * K)]] = False
    return {name: Schedule(compute=compute, branches=net.branch_names, flops=flops, origin=name)
            for name, compute in (("LTC", ltc), ("37.5 % CUR", random))}

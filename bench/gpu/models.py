"""What the whole-model parts share: the model with random weights, its schedules, its trajectories."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import ROOT
from bench.problems import random_schedule
from harmonica_dit.flops import count_flops
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.sample import Trajectory, image_noise
from harmonica_dit.schedule import Schedule

XL = CONFIGS["DiT-XL/2"] | dict(input_size=32, in_channels=4)
TINY = dict(input_size=4, patch_size=2, in_channels=4, hidden_size=24, depth=2, num_heads=2)
LTC = ROOT / "bench" / "data" / "ltc_dit_xl_2_t20.safetensors"


def steps(tiny: bool) -> int:
    """T."""
    return 4 if tiny else 20


def config(tiny: bool) -> dict:
    return TINY if tiny else XL


def attention(folder: Path) -> str:
    """The back end that the part `attention` found fastest and left in the folder; PyTorch's choice without it."""
    path = folder / "attention.json"
    return json.loads(path.read_text())["notes"].get("fastest", "sdpa") if path.exists() else "sdpa"


def model(tiny: bool, device: torch.device, attention: str) -> DiT:
    """Random weights in bfloat16 under which every branch counts: products keep the size of what they are given, and
    gates and modulation are not zero, as they are before a training."""
    return with_weights(device, lambda: DiT(**config(tiny), name="DiT-XL/2", attention=attention))


def with_weights(device: torch.device, make: Callable[[], nn.Module]) -> nn.Module:
    """What make() returns, with such weights."""
    torch.manual_seed(0)
    with device:
        net = make()
        for p in net.parameters():
            p.data.normal_(std=p[0].numel() ** -0.5 if p.dim() > 1 else 0.1)
    return net.to(torch.bfloat16).eval().requires_grad_(False)


def trajectory(net, images: int, device: torch.device, steps: int) -> Trajectory:
    labels = torch.arange(images, device=device) % net.num_classes
    return Trajectory(net, labels, steps=steps, scheduler="ddim")  # guided as Peebles & Xie do


def noise(net, images: int, device: torch.device) -> Tensor:
    return image_noise(0, 0, images, net.sample_shape).to(device)


def schedules(net: DiT, steps: int) -> dict[str, Schedule]:
    """Learning-to-Cache's for T = 20 (Ma et al., 2024), and one that reuses 37.5 % of the entries at random."""
    K, flops = len(net.branches), count_flops(net)
    ltc = Schedule.load(LTC).compute[:steps, :K]  # a dry run has fewer of both
    return {"LTC": Schedule(compute=ltc, branches=net.branch_names, flops=flops, origin="LTC"),
            "37.5 % CUR": random_schedule(net.branch_names, flops, steps, 0.375)}

"""What a forecast trunk makes of a ControlNet's changes, on small pipelines with random weights."""

import torch
from rich.progress import track
from torch import Tensor

import harmonica_dit
from support.control_pipes import CONTROL_PIPES, controlled

STEPS, SPEEDUPS = 20, (1.7, 2.5)
CONTROLS = {"none": dict(controlnet_conditioning_scale=0.0), "at all steps": {},
            "at the first half": dict(control_guidance_end=0.5)}


@torch.no_grad()
def measure() -> list[dict]:
    """A row for each pipeline, speedup and control: RMSEs of the latents, over the RMS of the plain ones."""
    rows = []
    for kind, entry in CONTROL_PIPES.items():
        pipe = entry.pipe()
        plain = {name: controlled(entry, pipe, steps=STEPS, **given) for name, given in CONTROLS.items()}
        size = rms(plain["none"])
        for speedup in track(SPEEDUPS, kind):
            harmonica_dit.enable_cache(pipe, speedup)
            cached = {name: controlled(entry, pipe, steps=STEPS, **given) for name, given in CONTROLS.items()}
            found = harmonica_dit.summary(pipe).speedup
            harmonica_dit.disable_cache(pipe)
            rows += [dict(pipeline=kind, speedup=found, control=name, error=rms(cached[name] - plain[name]) / size,
                          effect=rms(plain[name] - plain["none"]) / size,
                          cached_effect=rms(cached[name] - cached["none"]) / size) for name in CONTROLS]
    return rows


def rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def markdown(rows: list[dict]) -> str:
    lines = ["| pipeline | speedup | control | error of the cache | what the control changes | under the cache |",
             "|---" * 6 + "|"]
    return "\n".join(lines + [f"| {row['pipeline']} | {row['speedup']:.2f}× | {row['control']} | {row['error']:.3f} | "
                              f"{row['effect']:.3f} | {row['cached_effect']:.3f} |" for row in rows])

"""LoRA by peft with weights that are not 0, the same for every model with the same names; and its scale."""

import zlib

import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer


def inject(model, targets: str) -> None:
    """Puts a LoRA into the layers whose names match, in place."""
    inject_adapter_in_model(LoraConfig(r=4, target_modules=targets), model)
    _draw(model)


def wrap(model, targets: str):
    """The model in a `PeftModel`, with a LoRA in its layers."""
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules=targets))
    _draw(model)
    return wrapped


def _draw(model) -> None:
    found = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert found
    for name, p in found.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        p.data.copy_(0.4 * torch.randn(p.shape, generator=generator))
    model.eval().requires_grad_(False)


def layers(model) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def set_scale(model, scale: float) -> None:
    for layer in layers(model):
        layer.set_scale("default", scale)


def enable(model, enabled: bool) -> None:
    for layer in layers(model):
        layer.enable_adapters(enabled)


def merge(model) -> None:
    for layer in layers(model):
        layer.merge()


def unmerge(model) -> None:
    for layer in layers(model):
        layer.unmerge()

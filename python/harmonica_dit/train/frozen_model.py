"""The model during a training: it is frozen, and to save memory the backward pass can recompute its bodies."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica_dit.flops import replace_bodies, runs_by_its_loop


@contextmanager
def freeze(net):
    """Until the block ends, puts the model in evaluation mode and turns off gradients for its weights."""
    wanted = [(parameter, parameter.requires_grad) for parameter in net.parameters()]
    modes = [(module, module.training) for module in net.modules()]
    net.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, requires_grad in wanted:
            parameter.requires_grad_(requires_grad)
        for module, mode in modes:
            module.training = mode


def checkpoint_bodies(net):
    """Until the block ends, the backward pass recomputes the bodies, so that only their inputs and outputs are kept."""
    if runs_by_its_loop(net):
        return net.adapter.recomputing()
    return replace_bodies(net, lambda k, body: partial(_recompute, body))


def _recompute(body, h: Tensor, context) -> Tensor:
    if not torch.is_grad_enabled():
        return body(h, context)
    return checkpoint(body, h, context, use_reentrant=False, preserve_rng_state=False)  # a frozen model: no randomness

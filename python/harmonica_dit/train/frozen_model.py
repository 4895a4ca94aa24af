"""The model during a training: frozen, and where memory is short with its bodies recomputed in the backward."""

from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from harmonica_dit.flops import replace_bodies


@contextmanager
def freeze(net):
    """The model in evaluation mode and without gradients for its weights; afterwards as it was."""
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
    """The model's bodies recomputed in the backward, so that only what enters and leaves them is kept until then."""
    return replace_bodies(net, lambda k, body: partial(_recompute, body))


def _recompute(body, h: Tensor, context) -> Tensor:
    if not torch.is_grad_enabled():
        return body(h, context)
    return checkpoint(body, h, context, use_reentrant=False, preserve_rng_state=False)  # frozen: nothing is random

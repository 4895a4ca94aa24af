"""Ranks: processes that share one training or one sampling, as torchrun or `accelerate launch` starts them.

The group is torch.distributed's default one: a program's own, or the one that `launched` joins. Without one there is
one rank, number 0, and everything here hands back what it was given.
"""

import os
import pickle
import signal
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .launcher import started

T = TypeVar("T")

# Between two means all ranks do the same work: one that is so much later than the others has died.
PATIENCE = timedelta(minutes=1)
# One rank may measure, load or draw for hours while the others wait. A rank that dies closes its connections, which the
# others notice at once.
WAIT = timedelta(days=1)

# the default group, the group in which means are taken (of the device), the group in which is waited (gloo)
_made: tuple | None = None


@contextmanager
def launched():
    """Joins the ranks that torchrun or `accelerate launch` has started, until the block ends; else does nothing.

    A rank computes on the CUDA device of its LOCAL_RANK, where PyTorch sees one. SIGTERM, by which torchrun ends the
    others where a rank has failed, is like Ctrl-C until then: what it interrupts says how to go on.

    Raises:
        ValueError: fewer CUDA devices are seen than there are ranks on this machine.
    """
    global _made
    if started() == 1 or _joined():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend, local = "cpu:gloo,cuda:nccl", int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK: got {local}, but PyTorch sees {torch.cuda.device_count()} CUDA devices; "
                             "start as many processes on a machine as it has, or hide them (CUDA_VISIBLE_DEVICES=)")
        torch.cuda.set_device(local)
    before = signal.signal(signal.SIGTERM, _interrupt)
    dist.init_process_group(backend, timeout=WAIT)  # imports may take some ranks much longer than others
    _made = dist.group.WORLD, dist.new_group(timeout=PATIENCE), dist.group.WORLD
    barrier()  # a rank that fails at once would take away what another one is still joining by
    yield
    # after an error the others have no part in this any more, and the process ends
    barrier()
    dist.destroy_process_group()
    signal.signal(signal.SIGTERM, before)


def world() -> int:
    """How many ranks there are."""
    return dist.get_world_size() if _joined() else 1


def rank() -> int:
    """The number of this rank, from 0."""
    return dist.get_rank() if _joined() else 0


def is_main() -> bool:
    """Whether this is rank 0, which alone writes logs and files that are not of a rank's own share."""
    return rank() == 0


def split(n: int, of: int | None = None) -> range:
    """The share that this rank, or rank `of`, has of n things: in order, of sizes that differ by 1 at most.

    Of fewer things than ranks some have none, but rank 0 always has one.
    """
    of, ranks = rank() if of is None else of, world()
    return range(-(-n * of // ranks), -(-n * (of + 1) // ranks))


def check_split(name: str, n: int) -> None:
    """Refuses fewer images than ranks: some would have nothing to do."""
    if n < world():
        raise ValueError(f"{name}: got {n}, expected at least one image for each of the {world()} ranks")


@torch.no_grad()
def mean(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """Means over all ranks, of tensors that are means of `count` things here: sums and gradients by them are right too.

    On each rank the same, and one message, whatever the number of tensors.
    """
    if world() == 1:
        return list(tensors)
    sums = torch.cat([t.reshape(-1).double() for t in (*tensors, tensors[0].new_ones(1))]) * count
    with _said():
        dist.all_reduce(sums, group=_groups()[1])
    parts = (sums[:-1] / sums[-1]).split([t.numel() for t in tensors])
    return [part.view_as(t).to(t.dtype) for part, t in zip(parts, tensors)]


def on_main(function: Callable[..., T], *arguments) -> T:
    """Rank 0 calls it; every rank returns what that returned, or raises what it raised."""
    if world() == 1:
        return function(*arguments)
    outcome: list = [None, None]
    if is_main():
        try:
            outcome[0] = function(*arguments)
        except Exception as error:  # whatever it is, the others wait to hear of it
            _send([None, _portable(error)])
            raise
    _send(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _send(outcome: list) -> None:
    """From rank 0 to the others, whose lists are overwritten."""
    with _said():
        dist.broadcast_object_list(outcome, group=_groups()[2])


def _portable(error: Exception) -> Exception:
    """The error as another process can have it: some cannot be pickled, or made again from it."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"rank 0: {type(error).__name__}: {error}")


def main_first(function: Callable[[], T]) -> T:
    """Every rank calls it, the others after rank 0: so they find what it downloads or writes."""
    first: list[T] = []
    on_main(lambda: first.append(function()))
    return first[0] if first else function()


def broadcast(tensor: Tensor, source: int) -> Tensor:
    """Rank `source`'s tensor, of the CPU; the others give one of the same shape and dtype, which is overwritten."""
    if world() > 1:
        with _said():
            dist.broadcast(tensor, source, group=_groups()[2])
    return tensor


def gather(part: Tensor, n: int) -> Tensor | None:
    """On rank 0 the n rows of which each rank gives its `split`, on the CPU; None on the others."""
    if world() == 1:
        return part
    with _said():
        if not is_main():
            if split(n):  # what a rank without a share has made does not count
                dist.send(part, 0, group=_groups()[2])
            return None
        parts = [part]
        for other in range(1, world()):
            there = part.new_empty(len(split(n, other)), *part.shape[1:])
            if len(there):
                dist.recv(there, other, group=_groups()[2])
            parts.append(there)
    return torch.cat(parts)


def barrier() -> None:
    """Waits until every rank is here."""
    if world() > 1:
        with _said():
            dist.all_reduce(torch.zeros(1), group=_groups()[2])


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def _groups() -> tuple:
    global _made
    if _made is None or _made[0] is not dist.group.WORLD:  # a program's own group
        _made = dist.group.WORLD, dist.group.WORLD, dist.new_group(backend="gloo", timeout=WAIT)
    return _made


def _interrupt(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _said():
    """Gloo and NCCL say in words of their own that a rank is not there."""
    try:
        yield
    except RuntimeError as error:
        if signal.getsignal(signal.SIGTERM) is _interrupt:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which follows, has nothing to add
        raise ConnectionError(f"another of the {world()} ranks has ended, or was not heard of in time "
                              f"({str(error).partition('. ')[0]})") from error

"""A device that is only pretended, so that tensors of two devices that meet are seen on a machine with one.

Within `PretendedGpu()` the device "cuda" exists: its tensors lie in the CPU's memory and are marked, as are the results
of what is done with them. An op that is given both kinds raises, as it would on a GPU; but for what PyTorch allows: a
CPU tensor without dimensions, copies, and indices. Backwards and graphs are not followed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)
DEVICE_OF = Tensor.device.__get__
INDEXING = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_put_}


def is_marked(t: Tensor) -> bool:
    return t.__dict__.get("on_pretended_gpu", False)


class PretendedGpu(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None) -> Any:
        kwargs = kwargs or {}
        of = args[:1] if func == Tensor.__deepcopy__ else (args, kwargs)  # which is also given what is copied already
        given = [t for t in tree_flatten(of)[0] if isinstance(t, Tensor)]
        marked = [t for t in given if is_marked(t)]
        if func == DEVICE_OF:
            return GPU if marked else torch.device("cpu")
        if func == Tensor.is_cuda.__get__:
            return bool(marked)
        asked, args, kwargs = _without_device(func, args, kwargs)
        result = func(*args, **kwargs)
        if func == Tensor.data.__set__:  # as Module.to() does
            given[0].on_pretended_gpu = is_marked(given[1])
            return result
        if func == torch._has_compatible_shallow_copy_type:
            return result
        if func == Tensor.copy_:
            asked = "cuda" if is_marked(given[0]) else "cpu"
        if asked is not None:
            return _mark(result, asked == "cuda", given)
        if not marked:
            return result
        if func in INDEXING:  # a CPU index is taken, and one of the GPU that is a single value
            met = [] if is_marked(given[0]) else [given[0], *(t for t in marked if t.dim())]
        else:
            met = [t for t in given if not is_marked(t) and t.dim()]
        if met and len(met) > (func in INDEXING):
            raise RuntimeError(f"{func.__name__}: tensors on the pretended GPU and, of shape {tuple(met[0].shape)}, on "
                               "the CPU")
        return result if func in INDEXING and not is_marked(given[0]) else _mark(result, True, [])


def _without_device(func, args: tuple, kwargs: dict) -> tuple[str | None, tuple, dict]:
    """The device that is asked for; and the arguments with the CPU in the pretended one's place."""
    asked = {Tensor.cpu: "cpu", Tensor.cuda: "cuda"}.get(func)

    def replaced(value):
        nonlocal asked
        if isinstance(value, torch.device) or (isinstance(value, str) and value.split(":")[0] in ("cuda", "cpu")):
            asked = torch.device(value).type
            return torch.device("cpu")
        return value

    kwargs = {name: replaced(value) if name == "device" else value for name, value in kwargs.items()}
    if func == Tensor.to:
        if len(args) > 1 and isinstance(args[1], Tensor):  # x.to(other)
            asked, args = "cuda" if is_marked(args[1]) else "cpu", (args[0], args[1].dtype, *args[2:])
        args = tuple(map(replaced, args))
    return asked, args, kwargs


def _mark(result: Any, marked: bool, given: list[Tensor]) -> Any:
    def mark(t: Tensor) -> Tensor:
        if is_marked(t) != marked and any(t is one for one in given):
            t = t.detach()  # a move that had nothing to do: the original stays where it is
        t.on_pretended_gpu = marked
        return t
    return tree_map_only(Tensor, mark, result)


def move(model) -> None:
    """All parameters and buffers of a module, or of a pipeline's modules, to the pretended GPU."""
    parts = [model] if isinstance(model, nn.Module) else model.components.values()
    for part in parts:
        for t in (*part.parameters(), *part.buffers()) if isinstance(part, nn.Module) else ():
            t.on_pretended_gpu = True

"""What a generic adapter's modules do in one forward: branches by a row, the trunk as a whole, or a trace."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from harmonica_kernels import TrunkWeights

from .find_branches import feeders
from .generic_cache import GenericCache, GenericTrunkCache, Output, is_output, map_tensors, stand_in, tensors_of

ADVICE = "; adapter.trace(...) with such arguments leaves such a branch out"


class BranchRun:
    """One forward with a row: it decides what each branch does when it is called.

    A module that a forward calls more than once is one branch with several outputs.
    """

    def __init__(self, adapter, compute, row, weights, cache: GenericCache, threshold: float):
        self.names, self.compute, self.row, self.weights = adapter.branch_names, compute, row, weights
        self.cache, self.threshold, self.recompute = cache, threshold, adapter.recompute
        self.branch_of = {module: k for k, module in enumerate(adapter._modules)}
        self.fed_by = {feeder: k for k, feeding in enumerate(adapter._feeding) for feeder in feeding}
        self.calls = [0] * len(self.names)
        reused = range(len(self.names)) if isinstance(row, Tensor) else [k for k, c in enumerate(compute) if not c]
        # kept from the start, because a soft row replaces outputs in the cache that later calls still blend with
        self.held = {k: list(cache.outputs(k)) for k in reused}

    def replacements(self) -> Mapping[nn.Module, Callable]:
        """For each module to replace, what runs instead of its forward."""
        return dict.fromkeys(self.fed_by, self.feed) | dict.fromkeys(self.branch_of, self.branch)

    def feed(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """Runs a module whose output only goes into a branch. Nobody reads that output where the branch is reused."""
        if not self.compute[self.fed_by[module]]:
            return self.cache._stand_ins[module]
        o = self._compute(forward, args, kwargs)
        self.cache._stand_ins[module] = map_tensors(lambda t: torch.empty_like(t, device="meta"), o)
        return o

    def branch(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """Computes, reuses or blends a branch, and stores its output where the row says so."""
        k = self.branch_of[module]
        call = self.calls[k]
        self.calls[k] += 1
        reused = self._reuse(k, call) if k in self.held else None
        if not self.compute[k]:
            return reused
        o = self._compute(forward, args, kwargs)
        if not is_output(o):
            raise TypeError(f"{self.names[k]}: returned {type(o).__name__}, expected float tensors{ADVICE}")
        renew = True
        if isinstance(self.row, Tensor):
            r = self.row[k]
            o = map_tensors(lambda fresh, old: r * fresh + (1 - r) * old, o, reused)
            renew = r.item() > self.threshold
        elif any(t.requires_grad for t in tensors_of(o)):
            self.cache._cut = True
        if renew:
            self.cache._store(k, o, call == 0)
        return o

    def finish(self) -> None:
        """Refuses a forward whose branches the cache cannot stand for. The cache is then unusable until its reset."""
        for k, (name, count) in enumerate(zip(self.names, self.calls)):
            if not count or (k in self.held and count != len(self.held[k][0])):
                expected = len(self.held[k][0]) if k in self.held else "at least 1"
                raise RuntimeError(f"{name}: was called {count} times in this forward, expected {expected}{ADVICE}")

    def _compute(self, forward: Callable, args: tuple, kwargs: dict) -> Output:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
        return forward(*args, **kwargs)

    def _reuse(self, k: int, call: int) -> Output:
        """The output of branch k's call number `call`, repeated or forecast from the cache."""
        latest, *earlier = self.held[k]
        if call >= len(latest):
            raise RuntimeError(f"{self.names[k]}: is called more often than in the forward that stored its "
                               f"outputs{ADVICE}")
        e = 0.0 if self.weights is None or not earlier else self.weights[k]
        if not isinstance(e, (Tensor, Sequence)) and e == 0:
            return map_tensors(Tensor.clone, latest[call])  # the caller may write into what it is given
        weights = e if isinstance(e, Sequence) else (1 + e, -e)
        outputs = [forward[call] for forward in self.held[k][: len(weights)]]
        return map_tensors(lambda *last: _weigh(weights, last), *outputs)


class TrunkRun:
    """One forward whose blocks all run, or of which none runs: then the last one returns a forecast of its output."""

    def __init__(self, adapter, computed: bool, weights: TrunkWeights | None, cache: GenericTrunkCache):
        self.adapter, self.computed, self.weights, self.cache = adapter, computed, weights, cache
        *self.others, self.last = adapter._blocks
        self.called = 0

    def replacements(self) -> Mapping[nn.Module, Callable]:
        """For each module to replace, what runs instead of its forward."""
        return dict.fromkeys(self.others, self.other) | {self.last: self.end}

    def other(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """A block before the last. Where it does not run, nothing that the model returns depends on its output."""
        if not self.computed:
            return self.cache._stand_ins[module]
        o = forward(*args, **kwargs)
        if module not in self.cache._stand_ins:
            self.cache._stand_ins[module] = map_tensors(stand_in, o)
        return o

    def end(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """The last block, whose output is the trunk's state."""
        self.called += 1
        kept = list(self.cache._states)
        if not self.computed:
            return map_tensors(lambda *states: weigh_trunk(self.weights, states[0], states), *kept)
        o = forward(*args, **kwargs)
        self.cache._store(o)
        if self.weights is None:
            return o
        return map_tensors(lambda own, *states: weigh_trunk(self.weights, own, states), o, *kept)

    def finish(self) -> None:
        if self.called != 1:
            raise RuntimeError(f"{self.adapter.block_names[-1]}: was called {self.called} times in this forward, the "
                               "trunk's cache needs it to be called once; adapter.trace(...) says whether it can be "
                               "reused")


def weigh_trunk(weights: TrunkWeights | None, base: Tensor, states: Sequence[Tensor]) -> Tensor:
    """h = base + own∘base + Σ_i w_i∘c_i of `harmonica_kernels.TrunkWeights`, in float32 at least.

    base: a computed step's own state, or at a forecast step c_0.
    """
    if weights is None:
        return base.clone()
    exact = torch.promote_types(base.dtype, torch.float32)
    h = base.to(exact)
    if weights.own is not None:
        h = h + weights.own.to(base.device, exact) * base
    for w, state in zip(weights.states.to(base.device, exact), states):
        h = h + w * state
    return _rounded(h, base.dtype)


class Trace:
    """A plain forward that notes how branches and blocks behave. counter: of FLOPs."""

    def __init__(self, adapter, counter: FlopCounterMode):
        self.counter = counter
        self.name_of = dict(zip(adapter._modules, adapter.branch_names))
        self.block_of = dict(zip(adapter._blocks, adapter.block_names))
        self.feeder_of = {adapter.transformer.get_submodule(feeder): feeder for name in adapter.branch_names
                          for feeder in feeders(adapter.transformer, name)}
        self.order: dict[str, int] = {}  # of the first calls
        self.calls = dict.fromkeys((*self.name_of.values(), *self.block_of.values()), 0)
        self.odd: set[str] = set()
        self.nbytes: Counter[str] = Counter()  # of what each returned
        self.flops: Counter[str] = Counter()  # of each, with those of the modules inside
        self.stand_ins: dict[nn.Module, Output] = {}  # for the blocks' outputs
        self.last, self.returned = "", None  # the last block's name, and what it returned

    def replacements(self) -> Mapping[nn.Module, Callable]:
        """For each module to watch, what runs instead of its forward."""
        return (dict.fromkeys(self.feeder_of, self.feeder) | dict.fromkeys(self.name_of, self.branch)
                | dict.fromkeys(self.block_of, self.block))

    def feeder(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """A module whose output only goes into a branch: what it costs is the branch's."""
        return self._count(self.feeder_of[module], forward, args, kwargs)

    def branch(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """A branch."""
        return self._note(self.name_of[module], forward, args, kwargs)

    def block(self, module: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> Output:
        """A block, and what stands in for its output where no block runs."""
        self.last = self.block_of[module]
        self.returned = o = self._note(self.last, forward, args, kwargs)
        # whatever depends on these is NaN, also where it is multiplied by 0
        self.stand_ins[module] = map_tensors(lambda t: stand_in(t, torch.nan), o) if is_output(o) else None
        return o

    def _count(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Output:
        before = self.counter.get_total_flops()
        o = forward(*args, **kwargs)
        self.flops[name] += self.counter.get_total_flops() - before
        return o

    def _note(self, name: str, forward: Callable, args: tuple, kwargs: dict) -> Output:
        o = self._count(name, forward, args, kwargs)
        self.calls[name] += 1
        self.order.setdefault(name, len(self.order))
        if is_output(o):
            self.nbytes[name] += sum(t.nbytes for t in tensors_of(o))
        else:
            self.odd.add(name)
        return o

    def find_unfit(self) -> dict[str, str]:
        """The branches that cannot be reused, each with the reason."""
        unfit = {name: "is not called" for name in self.name_of.values() if not self.calls[name]}
        return unfit | {name: "its output is not float tensors" for name in self.name_of.values() if name in self.odd}


def _weigh(weights: Sequence[float | Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Σ w_i·o_i, in float32 at least."""
    dtype = outputs[0].dtype
    exact = torch.promote_types(dtype, torch.float32)
    return _rounded(sum(w * o.to(exact) for w, o in zip(weights, outputs)), dtype)


def _rounded(forecast: Tensor, dtype: torch.dtype) -> Tensor:
    """In a model's dtype. Beyond float16's largest number that number: an infinity would be NaN after the next norm."""
    if dtype == torch.float16:
        forecast = forecast.clamp(torch.finfo(dtype).min, torch.finfo(dtype).max)
    return forecast.to(dtype)

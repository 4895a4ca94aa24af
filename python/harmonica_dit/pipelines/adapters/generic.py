"""Any other diffusers transformer: branches found by name, computed or reused where they stand, without fused norms."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from harmonica_dit.flops import Flops
from harmonica_kernels.checks import check_forecast_weights, check_row

from .find_branches import feeders, find_branches
from .generic_cache import GenericCache, Output, is_output, map_tensors, tensors_of

ADVICE = "; adapter.trace(...) with such arguments leaves such a branch out"


class GenericAdapter:
    """Computes or reuses the attention and feed-forward modules of a transformer's blocks, whatever the class.

    They are found by name in the transformer's lists of blocks. In a single-stream block, where attention and
    feed-forward run side by side into one `proj_out`, that is the branch, and `attn` and `proj_mlp` are spared with
    it. While a call with a row runs, the branches' `forward` is replaced; other threads' calls of the same
    transformer are not touched by that, and nothing is left behind, also after an error.

    Args:
        transformer: a module whose blocks stand in lists (`nn.ModuleList`) that are its attributes.
        branches: submodules' names, such as a schedule's; None finds them, in the order of definition (`trace` knows
            the order of execution).

    Attributes:
        branch_names: the K branches. left_out: those that `trace` found unfit, each with the reason; always computed.

    Raises:
        TypeError: no branches are found. ValueError: a named one does not exist.
    """

    def __init__(self, transformer: nn.Module, branches: Sequence[str] | None = None):
        self.transformer = transformer
        if branches is None:
            found: dict[nn.Module, str] = {}
            for name in find_branches(transformer):
                found.setdefault(transformer.get_submodule(name), name)  # a module may have several
            branches = tuple(found.values())
        if not branches:
            raise TypeError(f"transformer: {type(transformer).__name__} has no list of blocks with attention or "
                            "feed-forward modules; name them as branches=")
        self.left_out: dict[str, str] = {}
        self._use(branches)
        self.check()

    @property
    def name(self) -> str:
        """The repository or folder that the weights came from, else the class."""
        config = getattr(self.transformer, "config", {})
        return config.get("_name_or_path") or type(self.transformer).__name__

    @property
    def architecture(self) -> dict[str, str | int]:
        """What a router has to have been made for: class, number of branches K and width D."""
        linears = [module for module in self._modules[0].modules() if isinstance(module, nn.Linear)]
        return {"class": type(self.transformer).__name__, "K": len(self.branch_names),
                "D": linears[-1].out_features if linears else 0}

    @property
    def modules(self) -> list[list[nn.Module]]:
        """For each branch, the modules that do not run where it is reused."""
        return [[module, *feeders] for module, feeders in zip(self._modules, self._feeding)]

    def new_cache(self, history: int = 1) -> GenericCache:
        """A cache for one trajectory."""
        return GenericCache(history)

    def check(self) -> None:
        """Refuses compiled code around the branches.

        Raises:
            ValueError: the message names the module.
        """
        for name, module in self._around.items():
            if module._compiled_call_impl is not None or hasattr(module, "_orig_mod"):
                raise ValueError(f"{name or 'transformer'}: has been compiled, and what a step computes is decided "
                                 "inside it; compile the modules inside the branches instead")

    def trace(self, *args, **kwargs) -> Flops:
        """Runs one forward of the transformer to see its branches at work; the arguments are the transformer's own.

        Puts `branch_names` in the order of execution and leaves out (`left_out`) what cannot be reused: a
        branch that is not called, and one whose output is not tensors, or is changed in place afterwards. This
        forward leaves `torch.inference_mode`, whose tensors do not tell whether they were changed. What was made there
        may be passed, also parameters that require no gradient; only torch refuses to change it in place.

        Returns:
            What the forward costs, branch by branch (matrix products, convolutions, attention).

        Raises:
            TypeError: no branch is left.
        """
        run = _Trace(self)
        with torch.inference_mode(False), torch.no_grad(), flop_counter() as counter:
            self._forward(self.transformer, args, kwargs, run)
        unfit = run.unfit()
        names = sorted((name for name in self.branch_names if name not in unfit), key=run.first.__getitem__)
        if not names:
            raise TypeError(f"transformer: none of its branches can be reused: {unfit}")
        self.left_out |= unfit
        self._use(names)
        counts = {name.partition(".")[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
        numbers = tuple(float(sum(counts.get(part, 0) for part in (name, *feeders(self.transformer, name))))
                        for name in names)
        return Flops(numbers, float(counter.get_total_flops()) - sum(numbers))

    def __call__(self, *args, row: Sequence[bool] | Tensor | None = None,
                 forecast_weights: Sequence[float] | Tensor | None = None, cache: GenericCache | None = None,
                 threshold: float = 0.1, **kwargs):
        """As the transformer's forward; row, forecast_weights, threshold as in `harmonica_kernels.cached_forward`.

        Args:
            cache: from `new_cache`, one for each trajectory and, where a step calls the transformer more than once,
                for each of these calls.

        Raises:
            TypeError, ValueError: an argument is not as it should be; the message names it.
            RuntimeError: the last forward with this cache was interrupted; or a branch was not called, or not as
                often as when its outputs were stored, or its output was changed in place (`trace` finds such branches
                and leaves them out; under `torch.inference_mode`, where a change cannot be seen, only `trace` does).
        """
        return self._call(self.transformer, args, kwargs, row, forecast_weights, cache, threshold)

    def _call(self, forward: Callable, args: tuple, kwargs: dict, row, forecast_weights, cache, threshold):
        """`__call__`, with the transformer's forward as `forward`."""
        compute = self._check(row, forecast_weights, cache, threshold)
        if cache is None:
            return forward(*args, **kwargs)
        of = _signature(args, kwargs)
        cache._check(of)
        run = _Run(self, compute, row, forecast_weights, cache, threshold)
        cache._of, cache._open = of, True
        output = self._forward(forward, args, kwargs, run)
        run.finish()
        cache._open = False
        return output

    def _forward(self, forward: Callable, args: tuple, kwargs: dict, run: "_Run"):
        with _replaced(run.modules):
            token = _current.set(run)
            try:
                return forward(*args, **kwargs)
            finally:
                _current.reset(token)

    def _use(self, names: Sequence[str]) -> None:
        submodules = dict(self.transformer.named_modules(remove_duplicate=False))
        unknown = [name for name in names if name not in submodules]
        if unknown:
            raise ValueError(f"branches: {type(self.transformer).__name__} has no submodule {unknown[0]!r}")
        if len({submodules[name] for name in names}) < len(names):
            raise ValueError("branches: two of the names are one module; name it once")
        self.branch_names = tuple(names)
        self._modules = [submodules[name] for name in names]
        self._feeding = [[submodules[feeder] for feeder in feeders(self.transformer, name)] for name in names]
        around = {".".join(name.split(".")[:end]) for name in names for end in range(name.count(".") + 2)}
        self._around = {name: submodules[name] for name in sorted(around)}  # "" is the transformer itself

    def _check(self, row, forecast_weights, cache, threshold) -> Sequence[bool]:
        if cache is not None and not isinstance(cache, GenericCache):
            raise TypeError(f"cache: got {type(cache).__name__}, expected what adapter.new_cache() makes")
        if not 0 <= threshold <= 1:
            raise ValueError(f"threshold: got {threshold}, expected a number from 0 to 1")
        K = len(self.branch_names)
        compute = check_row(K, row, cache)
        check_forecast_weights(K, forecast_weights, cache, compute, isinstance(row, Tensor))
        self.check()
        again = torch.is_grad_enabled() and getattr(self.transformer, "is_gradient_checkpointing", False)
        if again and row is not None:
            raise ValueError("transformer: its gradient checkpointing would compute the branches again, whatever the "
                             "row says; call transformer.disable_gradient_checkpointing()")
        return compute


class _Run:
    """One forward under a row: what each branch does when it is called.

    A module that a forward calls more than once is one branch, with an output for each call.
    """

    def __init__(self, adapter: GenericAdapter, compute, row, weights, cache: GenericCache | None, threshold):
        self.names, self.compute, self.row, self.weights = adapter.branch_names, compute, row, weights
        self.cache, self.threshold = cache, threshold
        self.branch_of = {module: k for k, module in enumerate(adapter._modules)}
        self.fed = {feeder: k for k, fed in enumerate(adapter._feeding) for feeder in fed}
        self.called = [0] * len(self.names)
        reused = range(len(self.names)) if isinstance(row, Tensor) else [k for k, c in enumerate(compute) if not c]
        self.held = {k: (cache.latest(k), cache.previous(k)) for k in reused}  # a soft row replaces what it blends with
        self.versions: list[tuple[int, Tensor, int]] = []

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose forward is replaced."""
        return [*self.branch_of, *self.fed]

    def feed(self, module: nn.Module, forward: Callable) -> Output:
        """A module whose output only goes into a branch: nobody reads it where that is reused."""
        if not self.compute[self.fed[module]]:
            return self.cache._meta[module]
        o = forward()
        self.cache._meta[module] = map_tensors(lambda t: torch.empty_like(t, device="meta"), o)
        return o

    def branch(self, module: nn.Module, forward: Callable) -> Output:
        k = self.branch_of[module]
        call = self.called[k]
        self.called[k] += 1
        reused = self._reused(k, call) if k in self.held else None
        if not self.compute[k]:
            return reused
        o = forward()
        if not is_output(o):
            raise TypeError(f"{self.names[k]}: returned {type(o).__name__}, expected float tensors{ADVICE}")
        renew = True
        if isinstance(self.row, Tensor):
            r = self.row[k]
            o = map_tensors(lambda fresh, old: r * fresh + (1 - r) * old, o, reused)
            renew = r.item() > self.threshold
        if renew:
            self.cache._store(k, o, call == 0)
        self._watch(k, o)
        return o

    def finish(self) -> None:
        """Refuses a forward that the cache does not stand for; it stays unusable until its reset."""
        for k, (name, count) in enumerate(zip(self.names, self.called)):
            if not count or (k in self.held and count != len(self.held[k][0])):
                expected = len(self.held[k][0]) if k in self.held else "at least 1"
                raise RuntimeError(f"{name}: was called {count} times in this forward, expected {expected}{ADVICE}")
        changed = self.changed()
        if changed:
            raise RuntimeError(f"{changed[0]}: its output was changed in place after it was returned{ADVICE}")

    def changed(self) -> list[str]:
        """Branches whose output was changed in place since they returned it."""
        return [self.names[k] for k, t, version in self.versions if t._version != version]

    def _reused(self, k: int, call: int) -> Output:
        latest, previous = self.held[k]
        if call >= len(latest):
            raise RuntimeError(f"{self.names[k]}: is called more often than in the forward that stored its "
                               f"outputs{ADVICE}")
        self._watch(k, latest[call])
        if self.weights is None or previous is None or not (isinstance(self.weights, Tensor) or self.weights[k]):
            return latest[call]
        e = self.weights[k]
        return map_tensors(lambda now, before: (1 + e) * now - e * before, latest[call], previous[call])

    def _watch(self, k: int, o: Output) -> None:
        """Notes the output's version; tensors of inference mode have none."""
        self.versions += [(k, t, t._version) for t in tensors_of(o) if not t.is_inference()]


class _Trace(_Run):
    """A plain forward that notes how its branches behave."""

    def __init__(self, adapter: GenericAdapter):
        super().__init__(adapter, [True] * len(adapter.branch_names), None, None, None, 0.0)
        self.first: dict[str, int] = {}
        self.odd: set[str] = set()

    def feed(self, module: nn.Module, forward: Callable) -> Output:
        return forward()

    def branch(self, module: nn.Module, forward: Callable) -> Output:
        k = self.branch_of[module]
        self.called[k] += 1
        self.first.setdefault(self.names[k], len(self.first))
        o = forward()
        if is_output(o):
            self._watch(k, o)
        else:
            self.odd.add(self.names[k])
        return o

    def unfit(self) -> dict[str, str]:
        """The branches that cannot be reused, each with the reason."""
        unfit = {name: "is not called" for name, count in zip(self.names, self.called) if not count}
        unfit |= dict.fromkeys(self.changed(), "its output is changed in place")
        return unfit | dict.fromkeys(self.odd, "its output is not float tensors")


_current: ContextVar[_Run | None] = ContextVar("harmonica_run", default=None)
_users: dict[nn.Module, int] = {}
_lock = threading.Lock()
_originals: dict[nn.Module, Callable | None] = {}


@contextmanager
def _replaced(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Puts `_decide` before the modules' forward. Calls in contexts without a run, such as other threads', pass."""
    with _lock:
        for module in modules:
            _users[module] = _users.get(module, 0) + 1
            if _users[module] == 1:
                _originals[module] = _replace(module, _decide)
    try:
        yield
    finally:
        with _lock:
            for module in modules:
                _users[module] -= 1
                if not _users[module]:
                    del _users[module]
                    _restore(module, _originals.pop(module))


def _decide(module: nn.Module, forward: Callable, args: tuple, kwargs: dict):
    run = _current.get()
    if run is not None and module in run.branch_of:
        return run.branch(module, lambda: forward(*args, **kwargs))
    if run is not None and module in run.fed:
        return run.feed(module, lambda: forward(*args, **kwargs))
    return forward(*args, **kwargs)


def _replace(module: nn.Module, call: Callable) -> Callable | None:
    """Lets `call(module, forward, args, kwargs)` stand for the module's forward. Returns what `_restore` needs."""
    forward, own = module.forward, module.__dict__.get("forward")  # accelerate's hooks have set one
    module.__dict__["forward"] = lambda *args, **kwargs: call(module, forward, args, kwargs)
    return own


def _restore(module: nn.Module, own: Callable | None) -> None:
    if own is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = own


def _signature(args: tuple, kwargs: dict) -> tuple:
    """Shape, dtype and device of a forward's tensor arguments."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((name, tuple(t.shape), t.dtype, str(t.device)) for name, value in named
                 for t in tensors_of(value) if isinstance(t, Tensor))


def flop_counter() -> FlopCounterMode:
    """torch's counter, which by itself leaves out the attention kernel of the CPU."""

    def attention(query, key, value, *_, out_shape=None, **__) -> int:
        return sdpa_flop_count(query, key, value)

    return FlopCounterMode(display=False, custom_mapping={
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention})

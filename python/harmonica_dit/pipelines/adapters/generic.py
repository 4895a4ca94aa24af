"""Any other diffusers transformer: finds its branches by name and computes or reuses them in place, unfused."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from harmonica_dit.flops import Flops, flop_counter
from harmonica_kernels.checks import check_forecast_weights, check_row

from .find_branches import feeders, find_branches
from .generic_cache import GenericCache, Output, is_output, map_tensors, tensors_of
from .replace_forwards import replace_forwards

ADVICE = "; adapter.trace(...) with such arguments leaves such a branch out"


class GenericAdapter:
    """Computes or reuses the attention and feed-forward modules of a transformer's blocks, whatever the class.

    They are found by name in the transformer's lists of blocks. In a single-stream block, attention and feed-forward
    run side by side into one `proj_out`. Then `proj_out` is the branch, and where it is reused, `attn` and `proj_mlp`
    do not run either. While a call with a cache runs, the branches' `forward` is replaced, but not for calls from other
    threads. Afterwards every `forward` is put back, also after an error.

    Args:
        transformer: a module with lists of blocks (`nn.ModuleList`) as attributes.
        branches: submodules' names, such as a schedule's. None finds them, in the order of definition; `trace` finds
            the order of execution.

    Attributes:
        branch_names: the K branches. left_out: branches that `trace` found unfit, each with the reason; they are always
            computed.

    Raises:
        TypeError: no branches are found. ValueError: a named one does not exist.
    """

    def __init__(self, transformer: nn.Module, branches: Sequence[str] | None = None):
        self.transformer = transformer
        if branches is None:
            found: dict[nn.Module, str] = {}
            for name in find_branches(transformer):
                found.setdefault(transformer.get_submodule(name), name)  # a module may have several names
            branches = tuple(found.values())
        if not branches:
            raise TypeError(f"transformer: {type(transformer).__name__} has no list of blocks with attention or "
                            "feed-forward modules; name them as branches=")
        self.left_out: dict[str, str] = {}
        self._use(branches)
        self.check()

    @property
    def name(self) -> str:
        """The repository or folder that the weights came from; if unknown, the class."""
        config = getattr(self.transformer, "config", {})
        return config.get("_name_or_path") or type(self.transformer).__name__

    @property
    def architecture(self) -> dict[str, str | int]:
        """The model's fingerprint; a router must have the same: class, number of branches K and width D."""
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
        """Runs one forward of the transformer and watches its branches; the arguments are the transformer's own.

        It puts `branch_names` into the order of execution. It moves those that cannot be reused to `left_out`: a branch
        that is not called, or whose output is not float tensors or is changed in place afterwards. The forward runs
        outside `torch.inference_mode`, because that mode's tensors do not tell whether they were changed. Such tensors
        may be passed, also as parameters that require no gradient; but torch refuses to change them in place.

        Returns:
            What the forward costs, branch by branch (matrix products, convolutions, attention).

        Raises:
            TypeError: no branch is left.
        """
        run = _Trace(self)
        with torch.inference_mode(False), torch.no_grad(), flop_counter() as counter:
            self._forward(self.transformer, args, kwargs, run)
        unfit = run.find_unfit()
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
            cache: from `new_cache`, one for each trajectory. If a step calls the transformer more than once, each of
                these calls has its own.

        Raises:
            TypeError, ValueError: an argument is not as it should be; the message names it.
            RuntimeError: the last forward with this cache was interrupted; or a branch was not called, or not as
                often as when its outputs were stored, or its output was changed in place. `trace` leaves such branches
                out. Under `torch.inference_mode` only `trace` notices a change in place.
        """
        return self._call(self.transformer, args, kwargs, row, forecast_weights, cache, threshold)

    def _call(self, forward: Callable, args: tuple, kwargs: dict, row, forecast_weights, cache, threshold):
        """`__call__`, but `forward` is called in place of the transformer."""
        compute = self._check(row, forecast_weights, cache, threshold)
        if cache is None:
            return forward(*args, **kwargs)
        of = _signature(args, kwargs)
        cache._check(of)
        run = _Run(self, compute, row, forecast_weights, cache, threshold)
        cache._begin(of)
        output = self._forward(forward, args, kwargs, run)
        run.finish()
        cache._end()
        return output

    def _forward(self, forward: Callable, args: tuple, kwargs: dict, run: "_Run"):
        with replace_forwards(run.replacements()):
            return forward(*args, **kwargs)

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
    """One forward with a row: it decides what each branch does when it is called.

    A module that a forward calls more than once is one branch with several outputs.
    """

    def __init__(self, adapter: GenericAdapter, compute, row, weights, cache: GenericCache | None, threshold):
        self.names, self.compute, self.row, self.weights = adapter.branch_names, compute, row, weights
        self.cache, self.threshold = cache, threshold
        self.branch_of = {module: k for k, module in enumerate(adapter._modules)}
        self.fed_by = {feeder: k for k, feeding in enumerate(adapter._feeding) for feeder in feeding}
        self.calls = [0] * len(self.names)
        reused = range(len(self.names)) if isinstance(row, Tensor) else [k for k, c in enumerate(compute) if not c]
        # kept from the start, because a soft row replaces outputs in the cache that later calls still blend with
        self.held = {k: list(cache.outputs(k)) for k in reused}
        self.versions: list[tuple[int, Tensor, int]] = []

    def replacements(self) -> Mapping[nn.Module, Callable]:
        """For each module to replace, what runs instead of its forward."""
        return dict.fromkeys(self.fed_by, self.feed) | dict.fromkeys(self.branch_of, self.branch)

    def feed(self, module: nn.Module, forward: Callable) -> Output:
        """Runs a module whose output only goes into a branch. Nobody reads that output where the branch is reused."""
        if not self.compute[self.fed_by[module]]:
            return self.cache._meta[module]
        o = forward()
        self.cache._meta[module] = map_tensors(lambda t: torch.empty_like(t, device="meta"), o)
        return o

    def branch(self, module: nn.Module, forward: Callable) -> Output:
        """Computes, reuses or blends a branch, and stores its output where the row says so."""
        k = self.branch_of[module]
        call = self.calls[k]
        self.calls[k] += 1
        reused = self._reuse(k, call) if k in self.held else None
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
        """Refuses a forward whose branches the cache cannot stand for. The cache is then unusable until its reset."""
        for k, (name, count) in enumerate(zip(self.names, self.calls)):
            if not count or (k in self.held and count != len(self.held[k][0])):
                expected = len(self.held[k][0]) if k in self.held else "at least 1"
                raise RuntimeError(f"{name}: was called {count} times in this forward, expected {expected}{ADVICE}")
        changed = self.find_changed()
        if changed:
            raise RuntimeError(f"{changed[0]}: its output was changed in place after it was returned{ADVICE}")

    def find_changed(self) -> list[str]:
        """Branches whose output was changed in place since they returned it."""
        return [self.names[k] for k, t, version in self.versions if t._version != version]

    def _reuse(self, k: int, call: int) -> Output:
        """The output of branch k's call number `call`, repeated or forecast from the cache."""
        latest, *earlier = self.held[k]
        if call >= len(latest):
            raise RuntimeError(f"{self.names[k]}: is called more often than in the forward that stored its "
                               f"outputs{ADVICE}")
        self._watch(k, latest[call])
        e = 0.0 if self.weights is None or not earlier else self.weights[k]
        if not isinstance(e, (Tensor, Sequence)) and e == 0:
            return latest[call]
        weights = e if isinstance(e, Sequence) else (1 + e, -e)
        outputs = [forward[call] for forward in self.held[k][: len(weights)]]
        return map_tensors(lambda *last: _weigh(weights, last), *outputs)

    def _watch(self, k: int, o: Output) -> None:
        """Notes the versions of the output's tensors; those of inference mode have none."""
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
        self.calls[k] += 1
        self.first.setdefault(self.names[k], len(self.first))
        o = forward()
        if is_output(o):
            self._watch(k, o)
        else:
            self.odd.add(self.names[k])
        return o

    def find_unfit(self) -> dict[str, str]:
        """The branches that cannot be reused, each with the reason."""
        unfit = {name: "is not called" for name, count in zip(self.names, self.calls) if not count}
        unfit |= dict.fromkeys(self.find_changed(), "its output is changed in place")
        return unfit | dict.fromkeys(self.odd, "its output is not float tensors")


def _weigh(weights: Sequence[float | Tensor], outputs: Sequence[Tensor]) -> Tensor:
    """Σ w_i·o_i."""
    result = weights[0] * outputs[0]
    for w, o in zip(weights[1:], outputs[1:]):
        result = result + w * o
    return result


def _signature(args: tuple, kwargs: dict) -> tuple:
    """Shape, dtype and device of a forward's tensor arguments."""
    named = [*enumerate(args), *sorted(kwargs.items())]
    return tuple((name, tuple(t.shape), t.dtype, str(t.device)) for name, value in named
                 for t in tensors_of(value) if isinstance(t, Tensor))

"""Any other diffusers transformer: finds blocks and branches by name and computes or reuses them in place, unfused."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from harmonica_dit.flops import Flops, count_flops, flop_counter
from harmonica_kernels import TrunkWeights
from harmonica_kernels.checks import autocast_dtype, check_forecast_weights, check_number, check_row

from .compiled import refuse_compiled
from .find_branches import check_is_module, feeders, find_blocks, find_branches, listed
from .generic_cache import Arguments, GenericCache, GenericTrunkCache, leaves, tensors_of
from .generic_runs import BranchRun, Trace, TrunkRun
from .replace_forwards import replace_forwards
from .tracing import copies, tracing

NOT_FINITE = "what the model returned was not finite, so that nothing could be seen in it"


class GenericAdapter:
    """Computes or reuses the attention and feed-forward modules of a transformer's blocks, or all its blocks together.

    They are found by name in the transformer's lists of blocks. In a single-stream block, attention and feed-forward
    run side by side into one `proj_out`. Then `proj_out` is the branch, and where it is reused, `attn` and `proj_mlp`
    do not run either. While a call with a cache runs, the modules' `forward` is replaced, but not for calls from other
    threads. Afterwards every `forward` is put back, also after an error.

    Args:
        transformer: a module with lists of blocks (`nn.ModuleList`) as attributes.
        branches: submodules' names, such as a schedule's. None finds them, in the order of definition; `trace` finds
            the order of execution.

    Attributes:
        branch_names: the K branches. block_names: the blocks that hold them, in order.
        left_out: branches that `trace` found unfit, each with the reason; they are always computed.
        flops: of the traced forward, branch by branch; None before `trace`.
        trunk_flops: the same with all of a block's work counted among its branches, which a step saves that runs no
            block. trunk_size: values of the trunk's state. Both None before `trace`, or if the trunk cannot be reused;
            then trunk_left_out says why.

    Raises:
        TypeError: no branches are found. ValueError: a named one does not exist.
    """

    def __init__(self, transformer: nn.Module, branches: Sequence[str] | None = None):
        check_is_module(transformer)
        self.transformer = transformer
        source = getattr(transformer, "config", {}).get("_name_or_path")  # of the weights, if that is known
        self.name = source or type(transformer).__name__  # a caller who knows the pipeline's may put it here
        self.recompute = False  # whether a backward computes the branches again, see `recomputing`
        self._note: Callable[[Tensor], Any] | None = None  # see `watching`
        if branches is None:
            branches = _first_names(transformer, find_branches(transformer))
        if not branches:
            raise TypeError(f"transformer: {type(transformer).__name__} has no list of blocks with attention or "
                            "feed-forward modules; name them as branches=")
        self.left_out: dict[str, str] = {}
        self.flops: Flops | None = None
        self.trunk_flops: Flops | None = None
        self.trunk_size: int | None = None
        self.trunk_left_out = "adapter.trace(...) has not looked yet"
        self._use(branches)
        self._use_blocks(_first_names(transformer, find_blocks(transformer)))
        self.check()

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

    def cache_nbytes(self, history: int = 1, unit: str = "branch") -> int:
        """Bytes that a full cache of a trajectory like the traced forward holds, at most.

        Raises:
            ValueError: no forward has been traced yet.
        """
        count_flops(self)
        return history * self._nbytes[unit]

    def new_cache(self, history: int = 1, unit: str = "branch") -> GenericCache | GenericTrunkCache:
        """A cache for one trajectory, of the branches or of the trunk."""
        return GenericTrunkCache(history) if unit == "trunk" else GenericCache(history)

    def is_current(self) -> bool:
        """Whether the transformer has the blocks that this adapter knows and no others, and in them its branches."""
        if [block for _, block in listed(self.transformer)] != self._listed:
            return False
        places = ((*name.rpartition("."), module) for name, module in self._around.items() if name)
        return all(self._around[parent]._modules.get(part) is module for parent, _, part, module in places)

    def check(self, unit: str = "trunk") -> None:
        """Refuses compiled code around what is computed or reused.

        Raises:
            ValueError: the message names the module.
        """
        for name, module in self._around.items():
            if name not in self.branch_names and (unit == "branch" or name not in self.block_names):
                refuse_compiled(name, module, self.transformer, unit)

    def trace(self, *args, **kwargs) -> Flops:
        """Runs a forward of the transformer and watches what it calls; the arguments are the transformer's own.

        It puts `branch_names` into the order of execution. It moves those that cannot be reused to `left_out`: a branch
        that is not called, or whose output is not float tensors. To learn whether the trunk can be reused it runs a
        second forward, with the last block's output of the first and nothing else, and compares what the two return.

        Returns:
            What the forward costs, branch by branch (matrix products, convolutions, attention).

        Raises:
            TypeError: no branch is left.
        """
        return self.trace_call(self.transformer, args, kwargs)

    def trace_call(self, forward: Callable, args: tuple, kwargs: dict) -> Flops:
        """`trace`, but `forward` is called in place of the transformer."""
        with tracing(), flop_counter() as counter:
            run = Trace(self, counter)
            output = self._forward(forward, *copies(args, kwargs), run)
        unfit = run.find_unfit()
        names = sorted((name for name in self.branch_names if name not in unfit), key=run.order.__getitem__)
        if not names:
            raise TypeError(f"transformer: none of its branches can be reused: {unfit}")
        self.left_out |= unfit
        self._use(names)
        self._nbytes = {"branch": sum(run.nbytes[name] for name in names), "trunk": run.nbytes.get(run.last, 0)}
        total = float(counter.get_total_flops())
        numbers = [float(sum(run.flops[part] for part in (name, *feeders(self.transformer, name)))) for name in names]
        self.flops = Flops(tuple(numbers), total - sum(numbers))
        self.trunk_flops = self.trunk_size = None
        self.trunk_left_out = self._find_trunk(forward, args, kwargs, run, output)
        if not self.trunk_left_out:
            self.trunk_size = sum(t.numel() for t in tensors_of(run.returned))
            for block in self.block_names:
                inside = [k for k, name in enumerate(names) if name.startswith(f"{block}.")]
                if inside:
                    numbers[inside[0]] += run.flops[block] - sum(numbers[k] for k in inside)
            self.trunk_flops = Flops(tuple(numbers), total - sum(numbers))
        return self.flops

    def _find_trunk(self, forward: Callable, args: tuple, kwargs: dict, run: Trace, output) -> str:
        """Whether the last block's output can stand for all blocks: "", or why not."""
        for name in self.block_names:
            if run.calls[name] != 1:
                return f"{name} is called {run.calls[name]} times in a forward"
            if name in run.odd:
                return f"{name} returns something else than float tensors"
        self._use_blocks(sorted(self.block_names, key=run.order.__getitem__))
        expected = leaves(output)
        if not all(isinstance(leaf, Tensor) for leaf in expected):
            return "the model returns more than tensors"
        if not all(leaf.isfinite().all() for leaf in expected):
            return NOT_FINITE
        cache = GenericTrunkCache()
        cache._store(run.returned)
        cache._stand_ins = run.stand_ins
        try:
            with tracing():
                found = leaves(self._forward(forward, *copies(args, kwargs), TrunkRun(self, False, None, cache)))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the model's own code, which was given NaN: of whatever kind
            return f"without its blocks a forward fails: {error}"
        if len(expected) != len(found) or not all(map(torch.equal, expected, found)):
            return f"what the model returns depends on more than the output of {self.block_names[-1]}"
        return ""

    def __call__(self, *args, row: Sequence[bool] | Tensor | bool | None = None,
                 forecast_weights: Sequence[float] | Tensor | TrunkWeights | None = None,
                 cache: GenericCache | GenericTrunkCache | None = None, threshold: float = 0.1, **kwargs):
        """As the transformer's forward; row, forecast_weights, threshold as in `harmonica_kernels.cached_forward`.

        Args:
            cache: from `new_cache`, one for each trajectory. If a step calls the transformer more than once, each of
                these calls has its own. With the trunk's, a step runs all blocks (row=None) or none (row=False).

        Raises:
            TypeError, ValueError: an argument is not as it should be; the message names it.
            RuntimeError: the last forward with this cache was interrupted; or a branch was not called, or not as
                often as when its outputs were stored. `trace` leaves such branches out. Or a gradient is wanted of a
                hard row's reused outputs, which are constants here.
        """
        return self._call(self.transformer, args, kwargs, row, forecast_weights, cache, threshold)

    def _call(self, forward: Callable, args: tuple, kwargs: dict, row, forecast_weights, cache, threshold=0.0):
        """`__call__`, but `forward` is called in place of the transformer."""
        trunk = isinstance(cache, GenericTrunkCache)
        compute = self._check_trunk(row, forecast_weights, cache) if trunk else self._check(
            row, forecast_weights, cache, threshold)
        if cache is None:
            with self._noting():
                return forward(*args, **kwargs)
        given = Arguments.of(args, kwargs)
        device = torch.device(given.tensors[0][3]).type if given.tensors else "cpu"  # weights may be offloaded
        alike = given, self.transformer, autocast_dtype(device)
        cache._check(*alike)
        if not trunk and cache._cut and torch.is_grad_enabled() and not isinstance(row, Tensor) and not all(compute):
            raise RuntimeError("cache: holds outputs that a gradient would have to pass through, and reused ones are "
                               "constants; run the trajectory under torch.no_grad(), or without a cache")
        run: BranchRun | TrunkRun
        if trunk:
            run = TrunkRun(self, compute[0], forecast_weights, cache)
        else:
            run = BranchRun(self, compute, row, forecast_weights, cache, threshold)
        cache._begin(*alike)
        output = self._forward(forward, args, kwargs, run)
        run.finish()
        cache._end()
        return output

    def _forward(self, forward: Callable, args: tuple, kwargs: dict, run: BranchRun | TrunkRun | Trace):
        with replace_forwards(run.replacements()):
            return forward(*args, **kwargs)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Until the block ends, a backward computes the branches again, so that only what enters them is kept."""
        self.recompute = True
        try:
            yield
        finally:
            self.recompute = False

    @contextmanager
    def watching(self, note: Callable[[Tensor], Any]) -> Iterator[None]:
        """Until the block ends, `note` is given what enters each branch in the adapter's calls without a cache: the
        first tensor of its arguments.
        """
        self._note = note
        try:
            yield
        finally:
            self._note = None

    @contextmanager
    def _noting(self) -> Iterator[None]:
        note = self._note

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            entering = next(leaf for leaf in leaves((args, kwargs)) if isinstance(leaf, Tensor))
            note(entering if torch.is_grad_enabled() else entering.clone())  # a model may write into it later

        handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in self._modules if note]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

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

    def _use_blocks(self, names: Sequence[str]) -> None:
        self.block_names = tuple(names)
        self._blocks = [self.transformer.get_submodule(name) for name in names]
        self._listed = [block for _, block in listed(self.transformer)]

    def _check(self, row, forecast_weights, cache, threshold) -> Sequence[bool]:
        if cache is not None and not isinstance(cache, GenericCache):
            raise TypeError(f"cache: got {type(cache).__name__}, expected what adapter.new_cache() makes")
        check_number("threshold", threshold, 1)
        K = len(self.branch_names)
        compute = check_row(K, row, cache)
        check_forecast_weights(K, forecast_weights, cache, compute, isinstance(row, Tensor))
        self._check_mode(row, "branch")
        return compute

    def _check_trunk(self, row, weights: TrunkWeights | None, cache: GenericTrunkCache) -> tuple[bool]:
        """(True,) if the blocks run, (False,) if none does."""
        if self.trunk_left_out:
            raise ValueError(f"cache: is the trunk's, which this model's forwards cannot reuse: {self.trunk_left_out}")
        if row not in (None, False):
            raise ValueError(f"row: got {row!r:.80} with a cache of the trunk, expected None or False")
        if weights is not None and not isinstance(weights, TrunkWeights):
            raise TypeError(f"forecast_weights: got {type(weights).__name__}, expected TrunkWeights")
        if row is False and not cache.filled:
            raise ValueError("row: got False, but the cache holds no state yet; run a forward with row=None first")
        if weights is not None:
            if weights.tokens is not None or (row is False and weights.own is not None):
                raise ValueError("forecast_weights: weigh what enters a step, which this adapter does not see")
            if len(weights.states) > cache.filled:
                raise ValueError(f"forecast_weights: of {len(weights.states)} states, the cache holds {cache.filled}")
        self._check_mode(row, "trunk")
        return (row is None,)

    def _check_mode(self, row, unit: str) -> None:
        self.check(unit)
        again = torch.is_grad_enabled() and getattr(self.transformer, "is_gradient_checkpointing", False)
        if again and row is not None:
            raise ValueError("transformer: its gradient checkpointing would compute the branches again, whatever the "
                             "row says; call transformer.disable_gradient_checkpointing()")


def _first_names(transformer: nn.Module, names: Iterable[str]) -> tuple[str, ...]:
    """One name for each module; it may have several."""
    found: dict[nn.Module, str] = {}
    for name in names:
        found.setdefault(transformer.get_submodule(name), name)
    return tuple(found.values())

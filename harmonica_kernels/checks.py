"""What `cached_forward` refuses, before memory is touched."""

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .cache import Forward, Memory, run_spans
from .trunk import TrunkCache, TrunkWeights

STORAGE = (torch.float32, torch.bfloat16, torch.float16)
HOST = ("cpu",)


def is_host(device: str) -> bool:
    """Whether Python reads what lies on such a device without waiting. Elsewhere the device decides what is renewed."""
    return device in HOST


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of the autocast that is on for such a device, or None."""
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def check_forward(branches, x, mod, row, forecast_weights, cache, threshold, eps, model) -> Sequence[bool]:
    """Raises on wrong arguments, before anything is changed. Returns for each entry whether it is computed.

    Where the row is a function, all but the first run are reused until it says otherwise.
    """
    if not isinstance(branches, (list, tuple)) or not all([hasattr(branch, "body") for branch in branches]):
        raise TypeError(f"branches: got {branches!r:.60}, expected a list of branches")
    K = len(branches)
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point() or x.layout is not torch.strided:
        what = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x: got {what}, expected a dense float tensor [B, N, D]")
    if x.device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"x: is on {x.device}; there are kernels for the CPU and for CUDA")
    if x.dtype not in (*STORAGE, torch.float64):
        raise TypeError(f"x: got {x.dtype}, expected float32, bfloat16 or float16 (float64 for checking gradients)")
    check_modulation(branches, x, mod, whole=row is not False)
    check_number("threshold", threshold, 1)
    check_number("eps", eps, 1e30)
    if model is not None and not type(model).__weakrefoffset__:
        raise TypeError(f"model: got {model!r:.60}, expected the module whose forward it is, or another object that "
                        "can be referred to weakly")
    if cache is not None:
        if not isinstance(cache, Memory):
            raise TypeError(f"cache: got {cache!r:.60}, expected a FeatureCache or a TrunkCache")
        cache._check(Forward(x.shape, x.dtype, x.device, K), model, autocast_dtype(x.device.type))
    if isinstance(cache, TrunkCache):
        check_trunk(row, forecast_weights, cache, x)
        return (row is not False,) * K
    entries = K
    if cache is not None:
        if cache.runs is not None and sum(cache.runs) != K:
            raise ValueError(f"cache: its runs hold {sum(cache.runs)} branches, there are {K}")
        cache.commit()
        entries = len(run_spans(cache.runs, K))
    compute = check_row(entries, row, cache, x.device)
    check_forecast_weights(entries, forecast_weights, cache, compute, isinstance(row, Tensor), x.device)
    return compute


def storage_beside(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that the kernels mix with x's."""
    return (torch.float64,) if x.dtype == torch.float64 else STORAGE


def check_number(name, number, most) -> None:
    if not isinstance(number, Real) or not 0 <= number <= most:  # NaN fails too
        raise ValueError(f"{name}: got {number!r:.60}, expected a number from 0 to {most:g}")


def check_modulation(branches, x, mod, whole: bool) -> None:
    """whole: whether the branches' rows are needed, beside the final norm's."""
    K, (B, _, D), dtypes = len(branches), x.shape, storage_beside(x)
    for name, count in (("shift", K + 1), ("scale", K + 1), ("gate", K)):
        rows = getattr(mod, name, None)
        if not isinstance(rows, (list, tuple)):
            raise TypeError(f"mod.{name}: got {rows!r:.60}, expected a list of {count} rows in a Modulation")
        if len(rows) != count:
            raise ValueError(f"mod.{name}: got {len(rows)} rows, expected {count} for {K} branches")
        for k, row in enumerate(rows):
            if row is not None and (not isinstance(row, Tensor) or row.layout is not torch.strided):
                raise TypeError(f"mod.{name}[{k}]: got {row!r:.60}, expected a dense tensor")
            if row is not None and (row.dim() != 2 or row.shape[0] not in (1, B) or row.shape[1] != D):
                raise ValueError(f"mod.{name}[{k}]: got shape {tuple(row.shape)}, expected [{B} or 1, {D}]")
            if row is not None and (row.device != x.device or row.dtype not in dtypes):
                raise TypeError(f"mod.{name}[{k}]: got {row.dtype} on {row.device}, expected one of {dtypes} on "
                                f"{x.device}")
    for k, branch in enumerate(branches if whole else ()):
        if branch.gate != (mod.gate[k] is not None):
            raise ValueError(f"mod.gate[{k}]: got {'no row' if branch.gate else 'a row'}, but branch {k} "
                             f"says gate={branch.gate}")


def check_row(K, row, cache, device=None) -> Sequence[bool]:
    """device: of x, where a tensor has to be; None is not compared."""
    if row is None:
        return (True,) * K
    if callable(row):
        runs = getattr(cache, "runs", None)
        if runs is None or len(runs) < 2 or runs[0] < 2:
            raise ValueError("row: a function decides on runs of branches; pass cache=FeatureCache(runs=) with two "
                             f"runs or more, the first of two branches or more, got runs={runs}")
        row = (True,) + (False,) * (K - 1)
    if not isinstance(row, (list, tuple, Tensor)):
        raise TypeError(f"row: got {row!r:.60}, expected None, {K} bools, a float tensor [{K}] or a function")
    if isinstance(row, Tensor) and not row.is_floating_point():
        raise TypeError(f"row: got a tensor of {row.dtype}; a hard row is a tuple of Python bools "
                        "(tensor.tolist()), a soft row a float tensor")
    if (tuple(row.shape) != (K,)) if isinstance(row, Tensor) else (len(row) != K):
        got = f"shape {tuple(row.shape)}" if isinstance(row, Tensor) else f"{len(row)} entries"
        raise ValueError(f"row: got {got}, expected {K}, one for each branch")
    if isinstance(row, Tensor):
        check_dense(row, "row", device)
        if is_host(row.device.type) and not torch.compiler.is_compiling() and not row.isfinite().all():
            raise ValueError(f"row: scores must be finite, got {row.tolist()}")
        if cache is None:
            raise ValueError("row: a soft row blends with cached outputs; pass cache=FeatureCache()")
        if cache.history > 2:
            raise ValueError(f"cache: keeps {cache.history} outputs of a branch, with a soft row at most 2")
        if getattr(cache, "runs", None) is not None:
            raise ValueError("cache: holds runs of branches, a soft row decides on single ones")
    else:
        for k, entry in enumerate(row):
            if not isinstance(entry, bool):
                raise TypeError(f"row[{k}]: got {entry!r}, expected a Python bool; for soft scores pass one tensor")
        if cache is None and not all(row):
            raise ValueError("row: the row reuses branches; pass cache=FeatureCache()")
    compute = (True,) * K if isinstance(row, Tensor) else row
    for k in range(K):
        if (isinstance(row, Tensor) or not row[k]) and not cache.filled(k):
            raise ValueError(f"row[{k}]: the cache holds no output of branch {k} yet; the first forward of a "
                             "trajectory computes everything (row=None)")
    return compute


def check_dense(t, name, device) -> None:
    if t.layout is not torch.strided or device not in (None, t.device):
        raise ValueError(f"{name}: got a tensor of layout {t.layout} on {t.device}, expected a dense one on {device} "
                         "like x")


def check_forecast_weights(K, weights, cache, compute, soft, device=None) -> None:
    if weights is None:
        return
    if isinstance(weights, Tensor):
        if weights.shape != (K,) or not weights.is_floating_point():
            raise ValueError(f"forecast_weights: got {weights.dtype} of shape {tuple(weights.shape)}, expected floats "
                             f"of shape ({K},)")
        check_dense(weights, "forecast_weights", device)
    elif not isinstance(weights, (list, tuple)):
        raise TypeError(f"forecast_weights: got {weights!r:.60}, expected {K} numbers")
    elif len(weights) != K:
        raise ValueError(f"forecast_weights: got {len(weights)}, expected {K}, one for each branch")
    if isinstance(weights, Tensor):
        if is_host(weights.device.type) and not torch.compiler.is_compiling() and not weights.isfinite().all():
            raise ValueError(f"forecast_weights: must be finite, got {weights.tolist()}")
        return
    for k, e in enumerate(weights):
        if isinstance(e, Sequence):
            if not soft and not compute[k]:
                check_output_weights(k, e, cache.filled(k))
            elif soft:
                raise TypeError(f"forecast_weights[{k}]: got {e!r:.60}; a soft row takes one number for each branch")
            continue
        if not isinstance(e, Real) or not -1e6 < e < 1e6:  # NaN fails too
            raise ValueError(f"forecast_weights[{k}]: got {e!r:.60}, expected a finite number")
        if e != 0 and (soft or not compute[k]) and (cache is None or cache.filled(k) < 2):
            held = 0 if cache is None else cache.filled(k)
            raise ValueError(f"forecast_weights[{k}]: a forecast needs the branch's last two computed outputs, the "
                             f"cache holds {held}" + (" (FeatureCache(history=2) keeps two)"
                                                if cache is None or cache.history == 1 else ""))


def check_output_weights(k, weights, filled) -> None:
    """Raises unless a reused branch's last outputs can be weighed so."""
    if not 1 <= len(weights) <= filled:
        raise ValueError(f"forecast_weights[{k}]: weighs {len(weights)} outputs of the branch, the cache holds "
                         f"{filled}")
    for w in weights:
        if not isinstance(w, Real) or isinstance(w, bool) or not -1e6 < w < 1e6:  # NaN fails too
            raise ValueError(f"forecast_weights[{k}]: got {w!r:.60}, expected finite numbers")


def check_trunk(row, weights, cache, x) -> None:
    """Raises if a forward with a TrunkCache is asked for anything but a whole step or a forecast."""
    if row is not None and row is not False:
        raise TypeError(f"row: got {row!r:.60}; with a TrunkCache a step is computed whole (None) or forecast (False)")
    if weights is None:
        if row is False:
            raise ValueError("forecast_weights: a forecast of the trunk needs TrunkWeights, got None")
        return
    if not isinstance(weights, TrunkWeights):
        raise TypeError(f"forecast_weights: got {type(weights).__name__}, expected TrunkWeights beside a TrunkCache")
    width, held = x.shape[2], cache.filled
    n = len(weights.states) if isinstance(weights.states, Tensor) else -1
    if row is False and (held == 0 or n == 0):
        raise ValueError(f"forecast_weights: a forecast needs a cached state, the cache holds {held} and {max(n, 0)} "
                         "have a weight; the first forward of a trajectory computes everything (row=None)")
    if n > held:
        raise ValueError(f"forecast_weights.states: weighs {n} cached states, the cache holds {held}")
    for name, t, shape in (("states", weights.states, (n, width)), ("tokens", weights.tokens, (n, width)),
                           ("own", weights.own, (width,))):
        if t is None and name != "states":
            continue
        good = isinstance(t, Tensor) and t.is_floating_point() and t.shape in (shape, (*shape[:-1], 1))
        if not good:
            got = f"{t.dtype} of shape {tuple(t.shape)}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"forecast_weights.{name}: got {got}, expected floats of shape {list(shape)} or, for one "
                             "number for all channels, a last size of 1")
        if t.device != x.device:
            raise ValueError(f"forecast_weights.{name}: is on {t.device}, expected {x.device} like x")
    for name, t in weights._asdict().items():
        if t is not None and t.dtype not in storage_beside(x):
            raise TypeError(f"forecast_weights.{name}: got {t.dtype} beside x of {x.dtype}, expected one of "
                            f"{storage_beside(x)}")


def check_output(o, h, x, k) -> None:
    if not isinstance(o, Tensor) or o.shape != x.shape or o.layout is not torch.strided:
        what = f"shape {tuple(o.shape)}, {o.layout}" if isinstance(o, Tensor) else type(o).__name__
        raise ValueError(f"branches[{k}].body: returned {what}, expected a dense tensor of shape {tuple(x.shape)}")
    if o.device != x.device or o.dtype not in storage_beside(x):
        raise TypeError(f"branches[{k}].body: returned {o.dtype} on {o.device}, expected floats on {x.device}")
    if o is h or (not torch.compiler.is_compiling()
                  and o.untyped_storage().data_ptr() == h.untyped_storage().data_ptr()):
        raise ValueError(f"branches[{k}].body: returned its input or a view of it; x is accumulated in place, so a "
                         "body must return a tensor of its own")

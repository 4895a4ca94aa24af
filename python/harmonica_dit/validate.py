"""Checks of routers, schedules and their files. Each refuses a wrong value and names the argument."""

import math
import os
import warnings

import torch
from torch import Tensor

from harmonica_dit.costs import Costs
from harmonica_dit.flops import Flops, runs_by_its_loop
from harmonica_kernels.cache import run_spans

FORMAT = 1  # of router and schedule files
MOST_STEPS = 1000  # as `make_scheduler` takes; what is made of a table takes time in proportion to the square of T
MOST_SETTING = 10_000  # a scheduler's setting, or a list's length: some make tables that long
WITH_FORECASTER = 2  # of schedule files with a forecaster or runs, which older versions cannot follow


def check_content(found: dict[str, Tensor], metadata: dict, path: str | os.PathLike, kind: str,
                  tensors: tuple[str, ...], fields: tuple[str, ...], optional: tuple[str, ...] = (),
                  optional_fields: tuple[str, ...] = ()) -> tuple[dict[str, Tensor], dict]:
    """The named tensors and metadata fields in the content of a router's or schedule's file, `flops` as `Flops`.

    Optional ones that the file lacks are left out.

    Raises:
        ValueError: the file is of another kind or format, or lacks something.
    """
    if metadata.get("kind") != kind:
        raise ValueError(f"{path}: expected a {kind}, its metadata says kind={metadata.get('kind')!r}")
    newer = "forecaster" in metadata or metadata.get("runs") is not None
    expected = WITH_FORECASTER if kind == "schedule" and newer else FORMAT
    if metadata.get("format") != expected:
        raise ValueError(f"{path}: expected format version {expected}, got {metadata.get('format')!r}; "
                         "another version of harmonica wrote it")
    missing = [name for name in tensors if name not in found] + [name for name in fields if name not in metadata]
    if missing:
        raise ValueError(f"{path}: a {kind} has to hold {', '.join(missing)}, this file does not")
    metadata = {name: metadata[name] for name in (*fields, *optional_fields) if name in metadata}
    try:
        branches, fixed = metadata["flops"]
        metadata["flops"] = Flops(tuple(branches), fixed)
    except (TypeError, ValueError):
        raise ValueError(f"{path}: flops: got {metadata['flops']!r}, expected [K numbers, a number]") from None
    return {name: found[name] for name in (*tensors, *optional) if name in found}, metadata


def check_fits(where: str, made, net) -> None:
    """Refuses a model of another architecture or with other branches; warns if only the name differs.

    made: a router or a schedule. net: a denoiser or an adapter.
    """
    mine, theirs = made.architecture, getattr(net, "architecture", None)
    if mine is not None and theirs is not None and any(theirs[key] != mine[key] for key in theirs.keys() & mine):
        raise ValueError(f"{where}for the architecture {mine}, the model {net.name!r} is {theirs}")
    names = tuple(net.branch_names)
    if len(names) != len(made.branches):
        raise ValueError(f"{where}for {len(made.branches)} branches of {made.model!r}, the model {net.name!r} has "
                         f"{len(names)}")
    for k, (mine, theirs) in enumerate(zip(made.branches, names, strict=True)):
        if mine != theirs:
            raise ValueError(f"{where}branch {k} is {mine!r}, the model {net.name!r} has {theirs!r} there")
    if made.model and made.model != net.name:
        warnings.warn(f"{where}made for the model {made.model!r}, used with {net.name!r}", stacklevel=4)


DENOISER = ("name", "sample_shape", "num_classes", "branch_names", "guidance", "guidance_channels", "scheduler",
            "width")
UNTRACED = ("branches", "tokens")  # what one needs whose FLOPs no adapter has counted


def check_denoiser(net) -> None:
    """Refuses what lacks an attribute of a denoiser, see `harmonica_dit.load`; the message names all that is lacking.
    """
    needed = DENOISER if runs_by_its_loop(net) else DENOISER + UNTRACED
    missing = [name for name in needed if not hasattr(net, name)]
    if missing:
        raise TypeError(f"net: {type(net).__name__} has no {', '.join(missing)}, which a denoiser needs: see the help "
                        "of harmonica_dit.load")


def check_table(name: str, table: Tensor, T: int, K: int) -> None:
    """Refuses everything but a finite float32 tensor [T, K], T ≤ 1000."""
    if not isinstance(table, Tensor) or table.dtype != torch.float32 or tuple(table.shape) != (T, K):
        raise TypeError(f"{name}: got {describe(table)}, expected a float32 tensor [{T}, {K}]")
    if not table.isfinite().all():
        raise ValueError(f"{name}: has entries that are not finite")
    if T > MOST_STEPS:
        raise ValueError(f"{name}: got {T} steps, expected at most {MOST_STEPS}")


def check_alike_in_runs(runs: tuple[int, ...], **tables: Tensor) -> None:
    """Refuses tables [T, K] whose columns differ within a run of branches."""
    for name, table in tables.items():
        for first, end in run_spans(runs, table.shape[1]):
            if (table[:, first:end] != table[:, first : first + 1]).any():
                raise ValueError(f"{name}: differs within the run of the branches {first} to {end - 1}")


def check_branches(branches, K: int) -> tuple[str, ...]:
    """The K names as a tuple."""
    if not isinstance(branches, (tuple, list)) or len(branches) != K or not all(isinstance(b, str) for b in branches):
        raise ValueError(f"branches: expected {K} names, one for each column, got {shorten(branches)}")
    return tuple(branches)


def check_costs(name: str, costs, K: int, kind: type[Costs] = Costs) -> None:
    """Refuses everything but costs of this kind of K branches with numbers ≥ 0 whose sum is above 0 and at most 1e30,
    so that sums over steps are finite.
    """
    if not isinstance(costs, kind):
        raise TypeError(f"{name}: got {type(costs).__name__}, expected {kind.__name__}")
    numbers = (*costs.branches, costs.fixed)
    good = len(costs.branches) == K and all(map(is_number, numbers)) and min(numbers) >= 0
    if not good or not 0 < costs.total <= 1e30:
        raise ValueError(f"{name}: expected {K} branches' numbers ≥ 0 and a fixed one, together at most 1e30, got "
                         f"{shorten(costs)}")


def check_timesteps(timesteps, T: int) -> tuple[float, ...]:
    """The T timesteps as a tuple."""
    if not isinstance(timesteps, (tuple, list)) or len(timesteps) != T or not all(map(is_number, timesteps)):
        raise ValueError(f"timesteps: expected {T} numbers, one for each row, got {shorten(timesteps)}")
    return tuple(timesteps)


def check_resolution(resolution) -> tuple[int, int] | None:
    """Height and width as a tuple, or None."""
    if resolution is None:
        return None
    whole = isinstance(resolution, (tuple, list)) and all(type(side) is int and side > 0 for side in resolution)
    if not whole or len(resolution) != 2:
        raise ValueError(f"resolution: expected the latents' (height, width), got {shorten(resolution)}")
    return tuple(resolution)


def check_architecture(architecture) -> None:
    """Refuses everything but None and a dict whose keys are strings and whose values are strings or whole numbers."""
    if architecture is not None and not (isinstance(architecture, dict) and all(
            isinstance(key, str) and type(value) in (str, int) for key, value in architecture.items())):
        raise TypeError(f"architecture: expected a dict such as an adapter's, got {shorten(architecture)}")


def check_scheduler_config(scheduler: str | None, config) -> None:
    """Refuses everything but None and a scheduler's settings as JSON has them, none of them large."""
    def small(value) -> bool:
        if isinstance(value, list):
            return len(value) <= MOST_SETTING and all(is_number(one) and abs(one) <= MOST_SETTING for one in value)
        if is_number(value):
            return abs(value) <= MOST_SETTING
        if isinstance(value, str):
            return len(value) <= MOST_SETTING
        return isinstance(value, bool) or value in (None, math.inf, -math.inf)

    if config is None:
        return
    if not isinstance(config, dict) or not all(isinstance(name, str) for name in config):
        raise TypeError(f"scheduler_config: got {describe(config)}, expected a dict of settings by name")
    wrong = {name: value for name, value in config.items() if name.startswith("_") or not small(value)}
    if wrong:
        raise ValueError(f"scheduler_config: got {shorten(wrong)}, expected numbers up to {MOST_SETTING:,}, texts, or "
                         "lists of such numbers")
    if scheduler is None:
        raise ValueError(f"scheduler_config: got {shorten(config)}, but scheduler is None, which has no settings")


def check_scheduler(where: str, schedule, name: str, config: dict | None) -> None:
    """Refuses another scheduler than that of a schedule's forecaster, or one with other settings.

    name, config: of the one in use; see `config_of`.
    """
    if schedule.scheduler not in (None, name):
        raise ValueError(f"{where}its forecaster is for the scheduler {schedule.scheduler!r}, this one is {name!r}")
    mine, theirs = schedule.scheduler_config or {}, config or {}
    names = differing(mine, theirs)
    if names:
        wanted, found = (", ".join(f"{key}={of[key]!r}" for key in names) for of in (mine, theirs))
        raise ValueError(f"{where}its forecaster is for {name} with {wanted}, this one has {found}; sampling without "
                         f"scheduler takes the right one, {name}.from_config(scheduler.config, {wanted}) makes it")


def differing(mine: dict, theirs: dict) -> list[str]:
    """The settings that two schedulers have differently. What one alone has, another version of diffusers knows."""
    return [key for key in mine if key in theirs and mine[key] != theirs[key]]


def check_threshold(threshold) -> float:
    if not is_number(threshold) or not 0 <= threshold <= 1:
        raise ValueError(f"threshold: got {threshold!r}, expected a number from 0 to 1")
    return float(threshold)


def check_whole(name: str, value, least: int) -> int:
    """The value, if it is a whole number from `least` on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: got {value!r}, expected a whole number from {least} on")
    return value


def check_one(**values) -> None:
    """Raises ValueError unless exactly one of two arguments is given; the other is None."""
    if sum(value is not None for value in values.values()) != 1:
        got = " and ".join(map(repr, values.values()))
        raise ValueError(f"{', '.join(values)}: give exactly one of them, got {got}")


def check_speedup(speedup) -> None:
    if not is_number(speedup) or speedup < 1:
        raise ValueError(f"speedup: got {speedup!r}, expected a number from 1 on")


def is_number(value) -> bool:
    """Whether value is a finite float or an int that fits in 64 bits, and no bool."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def describe(value) -> str:
    """A tensor's dtype and shape, or a value's type, for an error message."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def shorten(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."

"""What steps take on this device: measured on trajectories once, and kept on disk."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from harmonica_dit.costs import Seconds
from harmonica_dit.files import check_file
from harmonica_dit.flops import Flops, count_flops, trunk_costs
from harmonica_dit.forecaster import taylor
from harmonica_dit.memory import check_fits_memory
from harmonica_dit.schedule import Schedule
from harmonica_dit.timing import device_name, interleave, medians, steady_clock
from harmonica_dit.validate import check_whole

from .sampling import denoise
from .trajectory import Trajectory, image_noise

STEPS = 10  # of a measured trajectory; the first one or two are computed, and the others should weigh more


def measure_costs(net, *, batch: int, guidance: float | None = None, scheduler=None, rounds: int = 5,
                  path: str | os.PathLike | None = None) -> Seconds:
    """What each branch and a skipped step take on the device of `net`; read from a file where they are known already.

    Short trajectories are timed in turn, run step by step and not as CUDA graphs: uncached, and with a cache and, after
    the first steps, everything computed, repeated or forecast, half of the branches computed at random, or those of one
    kind. Of a kind are branches of as many FLOPs whose names end alike. The table is the one that explains these times
    best.

    Args:
        net: a denoiser, see `harmonica_dit.load`.
        batch: images at a time; with guidance the model's batch is twice as large.
        guidance, scheduler: of the trajectories; None is the model's own.
        rounds: each times every trajectory once; medians count.
        path: file of the table. None is one in the user's cache folder ($XDG_CACHE_HOME, or ~/.cache), named by device,
            threads, model, dtype, shape, batch, guidance, scheduler and torch's version.

    Raises:
        ValueError: an argument is out of range, or the file in `path` was measured on something else; the message names
            it.
        OSError: the file cannot be written.
        RuntimeError: the branches take too little time to be told from noise.
    """
    for name, value in (("batch", batch), ("rounds", rounds)):
        check_whole(name, value, 1)
    flops, weight = count_flops(net), next(net.parameters())
    check_fits_memory(net, batch, net.guidance if guidance is None else guidance, kept=len(net.branch_names))
    labels = (torch.arange(batch) % net.num_classes).to(weight.device)
    trajectory = Trajectory(net, labels, steps=STEPS, guidance=guidance, scheduler=scheduler)
    where = dict(device=device_name(weight.device), model=net.name, flops=flops.total, dtype=str(weight.dtype),
                 shape=list(net.sample_shape), batch=batch, guidance=trajectory.model.scale,
                 scheduler=trajectory.scheduler_name, torch=torch.__version__)
    if weight.device.type == "cpu":
        where["threads"] = torch.get_num_threads()
    path = kept_at(where) if path is None else Path(path)
    if path.exists():
        return _read(path, where)
    check_file(path)
    kinds: dict[tuple[float, str], list[int]] = {}
    for k, (count, name) in enumerate(zip(flops.branches, net.branch_names)):
        kinds.setdefault((count, name.rpartition(".")[2]), []).append(k)
    schedules = _schedules(net, flops, trajectory.steps, list(kinds.values()))
    noise = image_noise(0, 0, batch, net.sample_shape).to(weight.device)
    calls = {name: lambda made=made: denoise(trajectory.fork(), noise, made)
             for name, made in {"uncached": None, **schedules}.items()}
    seconds = interleave(calls, rounds, warmup=2, device=weight.device, clock=steady_clock())
    costs = _table(medians(seconds), schedules, list(kinds.values()), where)
    costs.save(path)
    return costs


def kept_at(where: dict) -> Path:
    """The file in the user's cache folder of what was measured on `where`."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "harmonica" / f"costs-{hashlib.sha256(json.dumps(where).encode()).hexdigest()[:16]}.json"


def _read(path: Path, where: dict) -> Seconds:
    costs = Seconds.load(path)
    for name, value in where.items():
        if costs.where.get(name) != value:
            raise ValueError(f"path: {path} was measured with {name}={costs.where.get(name)!r}, here it is {value!r}; "
                             "give another file, or remove it to measure again")
    return costs


def _schedules(net, flops: Flops, steps: int, kinds: Sequence[list[int]]) -> dict[str, Schedule]:
    """The trajectories that are timed beside the uncached one: the first one or two steps whole, the others alike."""
    K = len(flops.branches)
    nothing = torch.zeros(K, dtype=torch.bool)
    half = torch.rand(steps, K, generator=torch.Generator().manual_seed(0)) < 0.5

    def make(computed: int, rest: Tensor, **how) -> Schedule:
        compute = rest.expand(steps, K).clone()
        compute[:computed] = True
        return Schedule(compute, net.branch_names, flops, **how)

    forecast = dict(extrapolation=torch.ones(steps, K))
    trunk = taylor([s < 2 for s in range(steps)], 1, trunk_costs(net)[1])
    return {"computed": make(1, ~nothing), "repeated": make(1, nothing), "forecast": make(2, nothing, **forecast),
            "trunk": make(2, nothing, forecaster=trunk), "half repeated": make(1, half),
            "half forecast": make(2, half, **forecast)} | {
                f"kind {i}": make(1, torch.zeros_like(nothing).index_fill(0, torch.tensor(kind), True))
                for i, kind in enumerate(kinds)}


def _table(seconds: dict[str, float], schedules: dict[str, Schedule], kinds: Sequence[list[int]],
           where: dict) -> Seconds:
    """What explains the trajectories' times best: the sum of the squares of their relative errors is the least."""
    (T, K), n = schedules["computed"].compute.shape, len(kinds)

    def made(values: Sequence[float]) -> Seconds:
        of = {k: value for kind, value in zip(kinds, values) for k in kind}
        return Seconds(tuple(of[k] for k in range(K)), *values[n:], seconds["uncached"] / T, where)

    units = [made(row) for row in torch.eye(n + 4).tolist()]  # times are linear in the table's numbers
    shares = [[unit.of_trajectory(schedule) / seconds[name] for unit in units] for name, schedule in schedules.items()]
    shares = torch.tensor(shares, dtype=torch.float64)
    best = torch.linalg.lstsq(shares, torch.ones_like(shares[:, :1])).solution
    *branches, fixed, forecast, trunk, mixed = best.flatten().tolist()
    if min(*branches, fixed, trunk) <= 1e-9 * seconds["computed"]:  # 0 but for rounding is 0
        raise RuntimeError(f"net: what its branches take cannot be told from noise: {seconds['computed'] / T:.3g} s a "
                           f"step computed, {fixed:.3g} s repeated; measure more rounds or a larger batch, on a quiet "
                           "machine")
    return made([*branches, fixed, max(0.0, forecast), trunk, max(0.0, mixed)])

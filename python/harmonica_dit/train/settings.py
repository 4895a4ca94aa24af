"""The settings of a training, checked before it starts."""

import json
import zlib
from dataclasses import asdict, dataclass

import torch
from diffusers import SchedulerMixin

from harmonica_dit.costs import Costs
from harmonica_dit.sample.schedulers import scheduler_name
from harmonica_dit.validate import check_threshold, check_whole, is_number


@dataclass(frozen=True)
class Settings:
    """The arguments of `train_router` that decide its result; it explains them.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    steps: int
    target_speedup: float | None
    target_cur: float | None
    beta: float | None
    trajectories: int
    batch: int
    lr: float
    eps: float
    threshold: float
    importance: str
    importance_rows: str
    importance_scale: str
    refresh: int
    reseed: bool
    extrapolation: float | str
    costs: str | Costs
    compare: str
    halves: str
    guidance: float
    guidance_channels: int | None
    scheduler: str | SchedulerMixin
    autocast: str | None
    seed: int

    def __post_init__(self):
        for name, least in (("steps", 2), ("trajectories", 1), ("batch", 1), ("refresh", 1), ("seed", 0)):
            check_whole(name, getattr(self, name), least)
        goals = {name: getattr(self, name) for name in ("target_speedup", "target_cur", "beta")}
        given = {name: value for name, value in goals.items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"target_speedup, target_cur, beta: give exactly one of them, got {given or 'none'}")
        for name, value in given.items():
            if not is_number(value) or value < 0:
                raise ValueError(f"{name}: got {value!r}, expected a number ≥ 0")
        if self.beta is None and self.trajectories < 2:
            raise ValueError(f"trajectories: got {self.trajectories}, expected at least 2: with a target the first "
                             "one only measures")
        for name in ("lr", "eps"):
            value = getattr(self, name)
            if not is_number(value) or value <= 0:
                raise ValueError(f"{name}: got {value!r}, expected a number above 0")
        check_threshold(self.threshold)
        for name, known in (("importance", ("paper", "reference", "gain", "none")),
                            ("importance_rows", ("soft", "hard")), ("importance_scale", ("normalised", "raw")),
                            ("reseed", (False, True)), ("compare", ("all", "noise")),
                            ("halves", ("one", "both")), ("autocast", (None, "bfloat16"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(map(repr, known))}")
        if self.costs not in ("flops", "ones", "time") and not isinstance(self.costs, Costs):
            raise ValueError(f'costs: got {self.costs!r}, expected "flops", "ones", "time" or measured Seconds')
        if self.extrapolation != "learned" and not is_number(self.extrapolation):
            raise ValueError(f"extrapolation: got {self.extrapolation!r}, expected a number or 'learned'")

    def record(self, net) -> dict:
        """These settings and the model's properties, as JSON gives them back. A checkpoint must have the same."""
        return record_of(net, asdict(self))


def record_of(net, settings: dict) -> dict:
    """The settings of a training and the model's properties, as JSON gives them back."""
    scheduler = settings["scheduler"]
    if isinstance(scheduler, SchedulerMixin):
        config = {name: str(value) for name, value in scheduler.config.items()
                  if not name.startswith("_")}  # those are diffusers' notes; each process orders them differently
        scheduler = {"class": scheduler_name(scheduler), "config": config}
    prompts = getattr(net, "prompts", None)
    if hasattr(net, "call"):
        settings = settings | {"call": {name: str(value) for name, value in net.call.items()}}
    return json.loads(json.dumps(settings | {
        "scheduler": scheduler, "model": net.name, "branches": net.branch_names,
        "dtype": str(next(net.parameters()).dtype), "sample_shape": net.sample_shape,
        "weights": fingerprint(net), "prompts": prompts and prompts.checksum}))


def fingerprint(net) -> str:
    """A checksum over the names, shapes and first values of a model's parameters."""
    checksum = 0
    for name, parameter in net.named_parameters():
        values = parameter.detach().flatten()[:64].double().cpu()
        checksum = zlib.crc32(f"{name}{tuple(parameter.shape)}".encode(), checksum)
        checksum = zlib.crc32(values.numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def check_weights(dtype: str | torch.dtype) -> None:
    """Refuses weights in float16: routers cannot be trained with them."""
    if dtype in ("float16", torch.float16):
        raise ValueError("net: its weights are float16, in which gradients as small as a router's vanish; load it with "
                         'dtype="bfloat16"')

"""Schedulers: the reference's DDIM, and any of diffusers' by its class name."""

import inspect
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise

import diffusers
import numpy as np
import torch
from diffusers import (
    ConfigMixin,
    DDIMScheduler,
    DDPMParallelScheduler,
    DDPMScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils import DummyObject
from torch import Tensor

from harmonica_dit.flops import runs_by_its_loop
from harmonica_dit.validate import shorten

NOISE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
LEARNED_VARIANCE = (DDPMScheduler, DDPMParallelScheduler)  # these can use a learned variance

# what diffusers' classes raise of a wrong setting, as a file may have: few look at it before they compute with it
WRONG_SETTINGS = (ArithmeticError, LookupError, NameError, RuntimeError, TypeError, ValueError)


class ReferenceDDIM(DDIMScheduler):
    """DDIM as facebookresearch/DiT and HarmoniCa run it: deterministic, from each timestep to the next in its list.

    diffusers' own DDIM steps by a fixed stride instead, which gives other images. Timesteps are evenly spaced over
    0..999 inclusive; samples are not clipped; the last step goes to ᾱ = 1.
    """

    def __init__(self):
        super().__init__(**NOISE, clip_sample=False, set_alpha_to_one=True)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
                      timesteps: Sequence[int] | None = None) -> None:
        if timesteps is None:
            super().set_timesteps(num_inference_steps, device)  # checks the number
            spaced = np.round(np.linspace(999, 0, num_inference_steps)).astype(np.int64)
        else:
            spaced = np.asarray(timesteps, np.int64)
            self.num_inference_steps = len(spaced)
        self.timesteps = torch.from_numpy(spaced).to(device)
        abar = self.alphas_cumprod[torch.from_numpy(spaced)].tolist()
        self._alphas = dict(zip(spaced.tolist(), zip(abar, [*abar[1:], 1.0])))

    def updates(self) -> Tensor:
        """[T, 2] float32: a and b of each step, x_{s+1} = a·x_s + b·ε."""
        pairs = [self._alphas[t] for t in self.timesteps.tolist()]
        return torch.tensor([((after / now) ** 0.5, (1 - after) ** 0.5 - (after * (1 - now) / now) ** 0.5)
                             for now, after in pairs])

    def step(self, model_output: Tensor, timestep: int | Tensor, sample: Tensor,
             return_dict: bool = True) -> DDIMSchedulerOutput | tuple:
        """x_{s+1} = √ᾱ'·x̂_0 + √(1-ᾱ')·ε, with x̂_0 = (x_s - √(1-ᾱ)·ε)/√ᾱ (Song et al., 2021, eq. 12, σ = 0)."""
        now, after = self._alphas[int(timestep)]
        x0 = (sample - (1 - now) ** 0.5 * model_output) / now**0.5
        previous = after**0.5 * x0 + (1 - after) ** 0.5 * model_output
        return DDIMSchedulerOutput(previous, x0) if return_dict else (previous, x0)


def scheduler_name(scheduler: str | SchedulerMixin) -> str:
    """The name by which `make_scheduler` knows a scheduler, or one of its class."""
    if isinstance(scheduler, ReferenceDDIM):
        return "ddim"
    return scheduler if isinstance(scheduler, str) else type(scheduler).__name__


def config_of(scheduler: SchedulerMixin) -> dict | None:
    """A scheduler's settings as JSON has them, to be kept in a file; None if it has none, as "ddim".

    They are those of the copy that `make_scheduler` makes of it.
    """
    if isinstance(scheduler, ReferenceDDIM) or not isinstance(scheduler, ConfigMixin):
        return None
    made = _make_from_config(type(scheduler), scheduler.config)
    return {name: value for name, value in json.loads(made.to_json_string()).items() if not name.startswith("_")}


def from_record(name: str | None, config: dict | None) -> str | SchedulerMixin | None:
    """What `make_scheduler` takes for a scheduler that a file names: the name or, with settings, an instance.

    Raises:
        ValueError: there is no such scheduler, or it does not take these settings.
        ImportError: it needs a package that is not installed.
    """
    if config is None or name is None:
        return name
    cls = _class(name)
    if cls is None:
        raise ValueError(f"scheduler: the file's is {name!r}, which diffusers {diffusers.__version__} does not have")
    try:
        return cls.from_config(config)
    except WRONG_SETTINGS as error:
        raise ValueError(f"scheduler_config: {name} does not take {shorten(config)}: {error}") from None


def make_scheduler(scheduler: str | SchedulerMixin | None, steps: int, net=None,
                   timesteps: Sequence[float] | None = None) -> SchedulerMixin:
    """A scheduler set to `steps` steps.

    Args:
        scheduler: an instance, which is copied; None for the model's own; or a name. "ddim" and "iddpm" are the
            reference's (linear betas, timesteps evenly spaced over 0..999). Other names are classes of diffusers, with
            the configuration of the model's own scheduler or, if that is the reference's, with the reference's betas.
        steps: T, from 1 to 1000.
        net: the denoiser; its `scheduler` is the model's own. Without `net` that is the reference's DDIM.
        timesteps: the T timesteps, whole and falling within 0..999; None is the scheduler's own choice.

    Raises:
        TypeError, ValueError: there is no such scheduler, it is for models that predict something else, steps is out
            of range or not to be had with the scheduler's settings, or it takes no timesteps of one's own.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise ValueError(f"steps: got {steps!r}, expected a whole number from 1 to 1000")
    own = getattr(net, "scheduler", "ddim")
    scheduler = own if scheduler is None else scheduler
    if not isinstance(scheduler, (str, SchedulerMixin)):
        raise TypeError(f"scheduler: got {type(scheduler).__name__}, expected a name or a diffusers scheduler")
    if isinstance(scheduler, SchedulerMixin):
        made = ReferenceDDIM() if isinstance(scheduler, ReferenceDDIM) else _make_from_config(type(scheduler),
                                                                                              scheduler.config)
    else:
        made = _make_by_name(scheduler, _by_default(own) if isinstance(own, str) else own)
    try:
        if runs_by_its_loop(net):
            net.set_timesteps(made, steps)
        elif made.config.get("use_dynamic_shifting"):
            made.set_timesteps(steps, mu=_shift(made.config, net.tokens))
        else:
            made.set_timesteps(steps)
    except (ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:  # settings come from files too
        raise ValueError(f"scheduler: {type(made).__name__} with its settings has no trajectory of {steps} steps: "
                         f"{error}") from error
    if timesteps is not None and list(timesteps) != made.timesteps.tolist():
        _set_own_timesteps(made, steps, list(timesteps))
    return made


def _set_own_timesteps(scheduler: SchedulerMixin, steps: int, timesteps: list) -> None:
    last = min(1000, scheduler.config.get("num_train_timesteps", 1000)) - 1
    whole = all(float(t).is_integer() and 0 <= t <= last for t in timesteps)
    if not whole or len(timesteps) != steps or any(a <= b for a, b in pairwise(timesteps)):
        raise ValueError(f"timesteps: got {timesteps}, expected {steps} whole numbers that fall from at most {last} to "
                         "at least 0")
    timesteps = [int(t) for t in timesteps]
    if "timesteps" in inspect.signature(scheduler.set_timesteps).parameters:
        scheduler.set_timesteps(timesteps=timesteps)
    elif isinstance(scheduler, UniPCMultistepScheduler) and not scheduler.config.use_flow_sigmas:
        kept = scheduler.alphas_cumprod[timesteps]  # diffusers' takes none, but all that it needs is the noise there
        scheduler.timesteps = torch.tensor(timesteps)
        scheduler.sigmas = torch.cat([((1 - kept) / kept) ** 0.5, scheduler.sigmas[-1:]])
    else:
        raise ValueError(f"timesteps: {type(scheduler).__name__} chooses its own and takes none")


def steps_of(calls: int, scheduler: str | SchedulerMixin | None, net=None) -> int:
    """The `steps` of a trajectory with this number of calls of the model.

    They are equal for most schedulers; Heun's, for example, calls the model more often.

    Raises:
        TypeError, ValueError: as in `make_scheduler`, or this scheduler has no such trajectory.
    """
    for steps in range(calls, 0, -1):
        if len(make_scheduler(scheduler, steps, net).timesteps) == calls:
            return steps
    raise ValueError(f"scheduler: {scheduler!r} cannot call the model {calls} times, as the schedule needs")


def _by_default(name: str) -> SchedulerMixin | None:
    """A model's own scheduler that it has by name; None for the reference's."""
    cls = _class(name)
    return None if cls is None or "beta_schedule" in inspect.signature(cls).parameters else cls()


def _class(name: str) -> type[SchedulerMixin] | None:
    """diffusers' scheduler of this name; None if there is none. ImportError if it needs a package that is not there."""
    cls = getattr(diffusers, name, None)
    if isinstance(cls, DummyObject) and name.endswith("Scheduler"):
        cls()  # stands in for the class, and raises what names the package
    return cls if inspect.isclass(cls) and issubclass(cls, SchedulerMixin) and issubclass(cls, ConfigMixin) else None


def _make_by_name(name: str, own: SchedulerMixin | None) -> SchedulerMixin:
    """The scheduler `name` of the reference or of diffusers. own: the model's; None stands for the reference's DDIM."""
    cls = {"ddim": ReferenceDDIM, "iddpm": DDPMScheduler}.get(name) or _class(name)
    if cls is None:
        raise ValueError(f'scheduler: got {name!r}, expected "ddim", "iddpm" or the name of a diffusers scheduler, '
                         'such as "DPMSolverMultistepScheduler"')
    accepted = inspect.signature(cls.__init__).parameters
    flow = own is not None and "beta_schedule" not in own.config
    if flow == (cls is ReferenceDDIM or "beta_schedule" in accepted):
        theirs, ours = ("noise", "velocity") if flow else ("velocity", "noise")
        raise ValueError(f"scheduler: {name} is for models that predict the {theirs}, this model's own is for "
                         f"the {ours}; pass an instance if it fits after all")
    if name == "ddim":
        return ReferenceDDIM()
    if name == "iddpm":
        return DDPMScheduler(**NOISE, variance_type="learned_range", timestep_spacing="linspace", clip_sample=False)
    if own is not None:
        given = {"clip_sample": False} if "clip_sample" in accepted else {}
        return _make_from_config(cls, given | dict(own.config))
    wanted = NOISE | dict(clip_sample=False, prediction_type="epsilon")
    return cls(**{name: value for name, value in wanted.items() if name in accepted})


def _make_from_config(cls: type[SchedulerMixin], config: Mapping) -> SchedulerMixin:
    """A scheduler of diffusers with another's configuration."""
    if "learned" in (config.get("variance_type") or "") and not issubclass(cls, LEARNED_VARIANCE):
        config = dict(config) | {"variance_type": None}  # others would keep 3 channels of any output
    return cls.from_config(config)


def _shift(config: Mapping, tokens: int) -> float:
    """μ of resolution-dependent shifting: linear in the number of tokens (Esser et al., 2024; as in diffusers)."""
    low, high = config["base_image_seq_len"], config["max_image_seq_len"]
    return config["base_shift"] + (config["max_shift"] - config["base_shift"]) * (tokens - low) / (high - low)

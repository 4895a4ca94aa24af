"""Schedulers: the reference's DDIM, and any of diffusers' by its class name."""

import inspect

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

NOISE = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")


class ReferenceDDIM(DDIMScheduler):
    """DDIM as facebookresearch/DiT and HarmoniCa run it: deterministic, from each timestep to the next of its list.

    diffusers' own DDIM steps by a fixed stride instead of to the next timestep, which gives other images. Timesteps
    are evenly spaced over 0..999 inclusive; samples are not clipped; the last step goes to ᾱ = 1.
    """

    def __init__(self):
        super().__init__(**NOISE, clip_sample=False, set_alpha_to_one=True)

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        super().set_timesteps(num_inference_steps, device)  # checks the number
        spaced = np.round(np.linspace(999, 0, num_inference_steps)).astype(np.int64)
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


def make_scheduler(scheduler: str | SchedulerMixin, steps: int) -> SchedulerMixin:
    """A scheduler set to `steps` steps: "ddim" is the reference's, other names are diffusers' classes.

    Classes of diffusers get the noise schedule that DiT was trained with; an instance is copied and keeps its own.

    Raises:
        ValueError: there is no such scheduler, or steps is not from 1 to 1000.
    """
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise ValueError(f"steps: got {steps!r}, expected a whole number from 1 to 1000")
    if not isinstance(scheduler, (str, SchedulerMixin)):
        raise TypeError(f"scheduler: got {type(scheduler).__name__}, expected a name or a diffusers scheduler")
    if isinstance(scheduler, str):
        if scheduler == "ddim":
            made = ReferenceDDIM()
        else:
            cls = getattr(diffusers, scheduler, None)
            if not (inspect.isclass(cls) and issubclass(cls, SchedulerMixin)):
                raise ValueError(f'scheduler: got {scheduler!r}, expected "ddim" or the name of a diffusers scheduler, '
                                 'such as "DPMSolverMultistepScheduler"')
            accepted = inspect.signature(cls.__init__).parameters
            if "beta_schedule" not in accepted:
                raise ValueError(f"scheduler: {scheduler} has no noise schedule of the kind that these models predict "
                                 "the noise of")
            wanted = NOISE | dict(clip_sample=False, prediction_type="epsilon")
            made = cls(**{name: value for name, value in wanted.items() if name in accepted})
    else:
        cls = type(scheduler)
        made = ReferenceDDIM() if cls is ReferenceDDIM else cls.from_config(scheduler.config)
    made.set_timesteps(steps)
    return made

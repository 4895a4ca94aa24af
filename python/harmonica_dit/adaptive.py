"""A schedule that decides while a trajectory runs: what the sampler is given where there is no table beforehand."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

import harmonica_kernels as hk
from harmonica_dit.costs import Costs
from harmonica_dit.flops import Flops
from harmonica_dit.validate import check_branches, check_costs, check_fits, check_whole, is_number


@dataclass(eq=False)
class AdaptiveSchedule:
    """The first run of branches is computed at every step, the others where the first one's output has changed.

    The change is mean(|d - d'|) / mean(|d'|): d is what the first run adds to x at this step, d' what it added at the
    last step at which the others were computed. Above the threshold the others are computed, else what they added then
    is added again. One number decides for a whole batch, its unconditional half included; so an image depends on those
    that it is sampled with. Each decision waits for the device.

    It keeps account of what was computed, in all trajectories that have ended since it was made: `compute`, `cur` and
    `speedup`. `dataclasses.replace(schedule, ran=[])` is the same without an account.

    Args:
        steps: T.
        branches: the K branches' names in execution order. flops: of a forward of batch 1, branch by branch.
        first: how many branches the first run holds, from 2 to K - 1.
        threshold: of the change, ≥ 0.
        origin: the method, in words. model: name of the model that it was made for; "" is any.
        ran: the account. For each trajectory, for each step after the first: whether the others were computed, and the
            size of the batch.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.
    """

    steps: int
    branches: tuple[str, ...]
    flops: Flops
    first: int
    threshold: float
    origin: str = ""
    model: str = ""
    ran: list[list[tuple[bool, int]]] = field(default_factory=list, repr=False)
    unit = "branch"  # a run is several
    architecture = scheduler = forecaster = None

    def __post_init__(self):
        check_whole("steps", self.steps, 1)
        self.branches = check_branches(self.branches, len(self.branches))
        check_costs("flops", self.flops, len(self.branches), Flops)
        if check_whole("first", self.first, 2) >= len(self.branches):
            raise ValueError(f"first: got {self.first}, expected fewer than all {len(self.branches)} branches")
        if not is_number(self.threshold) or self.threshold < 0:
            raise ValueError(f"threshold: got {self.threshold!r}, expected a finite number ≥ 0")

    @property
    def runs(self) -> tuple[int, int]:
        """How many branches are computed always, and how many are decided on."""
        return self.first, len(self.branches) - self.first

    def new_cache(self, net=None) -> hk.FeatureCache:
        """A cache for one trajectory, which begins with it. net: the denoiser, which may be unable to decide so."""
        if hasattr(net, "new_cache"):
            return net.new_cache(runs=self.runs)
        self.ran.append([])
        return hk.FeatureCache(runs=self.runs)

    @property
    def rows(self) -> tuple:
        """The T rows: the first computes everything, the others are this object, which decides when it is called."""
        return (None, *(self,) * (self.steps - 1))

    @property
    def branch_rows(self) -> tuple[None, ...]:
        """What may be computed at each of the T steps: everything."""
        return (None,) * self.steps

    @property
    def forecast_weights(self) -> tuple[None, ...]:
        """Nothing is forecast."""
        return (None,) * self.steps

    def forecast_weights_on(self, device: torch.device) -> tuple[None, ...]:
        """Nothing is forecast."""
        return self.forecast_weights

    def condition_on(self, device: torch.device) -> None:
        """Nothing is added to the conditions."""

    def __call__(self, added: Tensor, reference: Tensor) -> bool:
        """Whether the other runs are computed at this step, and notes it; see `row` of `cached_forward`."""
        difference, size = (t.abs().mean(dtype=torch.float32) for t in (added - reference, reference))
        computed = bool(difference > self.threshold * size)
        self.ran[-1].append((computed, len(added)))
        return computed

    @property
    def compute(self) -> Tensor:
        """The share of forwards, weighed by their batch, in which each branch was computed: float64 [T, K].

        Raises:
            RuntimeError: no trajectory has ended yet.
        """
        ended = [ran for ran in self.ran if len(ran) == self.steps - 1]
        if self.steps > 1 and not ended:
            raise RuntimeError("schedule: decides while it runs, and no trajectory has ended yet")
        shares = torch.ones(self.steps, len(self.branches), dtype=torch.float64)
        for s, decisions in enumerate(zip(*ended), 1):
            shares[s, self.first :] = sum(B for computed, B in decisions if computed) / sum(B for _, B in decisions)
        return shares

    @property
    def cur(self) -> float:
        """Cache utilization ratio as run: reused entries / (T·K), from 0 to 1. Raises as `compute` does."""
        return 1 - self.compute.mean().item()

    @property
    def speedup(self) -> float:
        """FLOPs of the uncached trajectory / FLOPs as run. Raises as `compute` does."""
        return self.speedup_by(self.flops)

    def speedup_by(self, costs: Costs) -> float:
        """`speedup` in other costs, such as the seconds that `measure_costs` found. Raises as `compute` does."""
        return self.steps * costs.uncached / costs.of_trajectory(self)

    @property
    def extrapolation(self) -> Tensor:
        """Nothing is forecast: zeros [T, K]."""
        return torch.zeros(self.steps, len(self.branches))

    def decision_tables(self):
        """There are none."""
        raise ValueError("schedule: decides while it runs and has no table; on the device the first branch's change "
                         'decides: harmonica_kernels.compile(denoise, mode="gated", rule="change"), without a schedule')

    def check(self, net, trajectory) -> None:
        """Refuses other branches and another number of steps; warns of a model of another name.

        Raises:
            ValueError: the schedule does not fit; the message says what differs.
        """
        check_fits("schedule: ", self, net)
        if trajectory.steps != self.steps:
            raise ValueError(f"schedule: for {self.steps} steps, the trajectory has {trajectory.steps}")

"""The router: T×K learned scores that say which branches are computed at which step."""

import os
import warnings

import torch
from torch import Tensor, nn

from harmonica_dit.fashion import find
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import (
    FORMAT,
    check_architecture,
    check_branches,
    check_content,
    check_costs,
    check_fits,
    check_resolution,
    check_table,
    check_threshold,
    check_timesteps,
    describe,
    is_number,
)
from harmonica_kernels.graphs.gated import DecisionTables

LIMIT = 5.0  # logits are kept within ±5 (published code), so that no score saturates
ALWAYS = 20.0  # the logit of what is computed and not learned: its score is 1 in float32, above every threshold but 1
FIELDS = ("branches", "flops", "timesteps", "model", "scheduler", "guidance", "threshold", "beta", "seed")
OPTIONAL = ("resolution", "architecture", "recipe")  # older files lack these
SOFT = 0.1, 0.9  # scores between these are soft
MOST_SOFT = 0.2  # the share of soft scores above which a router is said to be soft


class Router(nn.Module):
    """Scores r[s, k] = sigmoid(logit[s, k]), one Parameter [K] per row; row 0 computes everything and has none.

    Each row has its own Parameter. In a single tensor, AdamW's momentum would go on moving the other rows.

    Args:
        logits: float32 [T, K], T ≥ 2; row 0 is not used.
        branches: the K branches' names in execution order. flops: of a forward of batch 1, branch by branch.
        timesteps: the T timesteps of the trajectory.
        extrapolation: float32 [T, K] extrapolation coefficients a (row 0 is not used), or None to repeat.
        learn_extrapolation: whether the coefficients are trained.
        threshold: τ; branch k is computed at step s iff r[s, k] > τ.
        model, scheduler: names. guidance: the guidance scale in training.
        beta: the weight of the cost in training. seed: of the training.
        resolution: height and width of the latents in training, None if unknown.
        architecture: the fingerprint of the model's class (see `adapt`), None if unknown.
        recipe: the recipe of the training and what differs from it (see `train_router`), None if unknown.

    Raises:
        TypeError, ValueError: an argument is not as above; the message names it.

    Source: HarmoniCa (Huang et al., ICML 2025, arXiv 2410.01723), section 3; Learning-to-Cache (Ma et al., 2024).
    """

    def __init__(self, logits: Tensor, branches: tuple[str, ...], flops: Flops, timesteps: tuple[float, ...], *,
                 extrapolation: Tensor | None = None, learn_extrapolation: bool = False, threshold: float = 0.1,
                 model: str = "", scheduler: str = "ddim", guidance: float = 1.5, beta: float | None = None,
                 seed: int | None = None, resolution: tuple[int, int] | None = None,
                 architecture: dict[str, str | int] | None = None, recipe: str | None = None):
        super().__init__()
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) < 2 or not logits.shape[1]:
            raise TypeError(f"logits: got {describe(logits)}, expected a float32 tensor [T, K] with T ≥ 2")
        T, K = logits.shape
        check_table("logits", logits, T, K)
        self.branches, self.timesteps = check_branches(branches, K), check_timesteps(timesteps, T)
        check_costs("flops", flops, K, Flops)
        self.flops = flops
        for name, value in (("model", model), ("scheduler", scheduler), ("recipe", recipe or "")):
            if not isinstance(value, str):
                raise TypeError(f"{name}: got {value!r}, expected text")
        for name, value in (("guidance", guidance), ("beta", beta), ("seed", seed)):
            if value is not None and not is_number(value):
                raise ValueError(f"{name}: got {value!r}, expected a finite number")
        self.threshold = check_threshold(threshold)
        self.model, self.scheduler, self.guidance, self.beta, self.seed = model, scheduler, guidance, beta, seed
        check_architecture(architecture)
        self.resolution, self.architecture, self.recipe = check_resolution(resolution), architecture, recipe
        self.logits = nn.ParameterList(row.detach().clone() for row in logits[1:])
        self.coefficients = None
        if extrapolation is not None:
            check_table("extrapolation", extrapolation, T, K)
            self.coefficients = nn.ParameterList(row.detach().clone() for row in extrapolation[1:])
            self.coefficients.requires_grad_(learn_extrapolation)

    @property
    def steps(self) -> int:
        """T."""
        return len(self.logits) + 1

    @property
    def soft_share(self) -> float:
        """The share of the trained scores (those below 1, which is `ALWAYS`) between 0.1 and 0.9.

        Training blends by these scores; in inference the threshold cuts through them.
        """
        scores, (least, most) = self.scores(), SOFT
        return int(((scores > least) & (scores < most)).sum()) / max(int((scores < 1).sum()), 1)

    @property
    def history(self) -> int:
        """How many outputs of each branch a feature cache keeps while this router's soft rows run."""
        return 1 if self.coefficients is None else 2

    def score(self, s: int) -> Tensor:
        """Row s ≥ 1 of the scores [K], differentiable."""
        return self.logits[s - 1].sigmoid()

    def scores(self) -> Tensor:
        """All scores [T, K], without grad; row 0 is 1."""
        rows = torch.stack([row.detach() for row in self.logits]).sigmoid()
        return torch.cat([torch.ones_like(rows[:1]), rows])

    def clamp_(self, s: int) -> None:
        """Keeps row s within ±5."""
        self.logits[s - 1].detach().clamp_(-LIMIT, LIMIT)

    def schedule(self, threshold: float | None = None) -> Schedule:
        """The frozen schedule at a threshold, by default the router's own."""
        threshold = self.threshold if threshold is None else check_threshold(threshold)
        compute = decide(self.scores(), threshold)
        compute[0] = True
        return Schedule(compute, self.branches, self.flops, self._extrapolation(), timesteps=self.timesteps,
                        model=self.model, origin=f"router, threshold {threshold:g}", guidance=self.guidance,
                        resolution=self.resolution, architecture=self.architecture)

    def decision_tables(self) -> DecisionTables:
        """What an executor decides by, for `executor.load`."""
        return DecisionTables(self.scores(), self._extrapolation())

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, whole or not at all; row 0 of the logits is stored as the largest logit."""
        rows = torch.stack([row.detach().float().cpu() for row in self.logits])
        tensors = {"logits": torch.cat([torch.full_like(rows[:1], LIMIT), rows])}
        if self.coefficients is not None:
            tensors["extrapolation"] = self._extrapolation()
        metadata = {name: getattr(self, name) for name in FIELDS + OPTIONAL} | dict(
            kind="router", format=FORMAT, flops=[self.flops.branches, self.flops.fixed], steps=self.steps,
            cur=self.schedule().cur, soft_share=self.soft_share)
        save_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike, net=None) -> "Router":
        """Reads a file that `save` wrote, or a bundled router by its name, such as "fashion-dit-2.0x".

        With `net`, it also checks that the router fits this model.

        Raises:
            FileNotFoundError: there is no such file, and no such bundled router.
            ValueError: the file is not a whole router of this format, or is for another architecture or other branches;
                the message names the file and what was expected. If only the model's name differs, that is a warning.
        """
        path = find(path)
        return cls.from_tensors(*load_tensors(path), path, net)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], metadata: dict, path: str | os.PathLike, net=None) -> "Router":
        """Makes a router from the content of a file, for `load`. path: for error messages."""
        tensors, metadata = check_content(tensors, metadata, path, "router", ("logits",), FIELDS, ("extrapolation",),
                                          OPTIONAL)
        try:
            router = cls(**tensors, **metadata)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        if net is not None:
            check_fits(f"{path}: ", router, net)
        return router

    def _extrapolation(self) -> Tensor | None:
        if self.coefficients is None:
            return None
        rows = torch.stack([row.detach().float().cpu() for row in self.coefficients])
        return torch.cat([torch.zeros_like(rows[:1]), rows])


def warn_if_soft(router: Router) -> None:
    """Warns if more than a fifth of the router's scores are soft: its schedule is not what the training ended with."""
    if router.soft_share > MOST_SOFT:
        least, most = SOFT
        warnings.warn(f"soft_share: {router.soft_share:.0%} of the router's scores lie between {least} and {most}; the "
                      "training blended these outputs, the schedule computes or reuses them", stacklevel=3)


def decide(scores: Tensor, threshold: float) -> Tensor:
    """r > τ, compared in float64 as Python floats are. A float32 score of 0.1 is above τ = 0.1 only in float64."""
    return scores.detach().double() > threshold


def read(path: str | os.PathLike, net=None) -> Router | Schedule:
    """Reads the router or schedule in a file, or the bundled one of that name, see `harmonica_dit.fashion.find`.

    Raises:
        FileNotFoundError, ValueError: there is no such file, it holds neither, or its router does not fit `net`.
    """
    path = find(path)
    tensors, metadata = load_tensors(path)
    if metadata.get("kind") == "router":
        return Router.from_tensors(tensors, metadata, path, net)
    return Schedule.from_tensors(tensors, metadata, path)


def schedule_of(found: str | os.PathLike | Router | Schedule, threshold: float | None = None) -> Schedule:
    """The schedule that a router, a schedule or a file of either stands for; `threshold` replaces a router's own.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds neither, or τ is out of range or no router's.
    """
    path = found if isinstance(found, (str, os.PathLike)) else "this"
    if path is found:
        found = read(path)
    if isinstance(found, Router):
        return found.schedule(threshold)
    if threshold is not None:
        raise ValueError(f"threshold: is a router's, {path} is a schedule, which has been decided already")
    return found

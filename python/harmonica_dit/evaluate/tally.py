"""One method's row of a comparison, summed up batch by batch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bootstrap import interval, mean_draws
from .metrics import Judge, rmse
from .named_methods import Method

MEANS = ("error", "accurate_error", "latent_error", "accurate_latent_error", "psnr", "ssim", "label_accuracy")


@dataclass(frozen=True)
class Made:
    """A batch of a method: the sampler's values, and the images that they are or are decoded to (None of neither)."""

    samples: Tensor
    images: Tensor | None


@dataclass
class Tally:
    """Sums up one method's samples.

    judge: of images; None where the samples are latents that nothing decodes. latents: whether they are latents, whose
    errors are of unclipped values. prompts: of a text model, by label.
    """

    judge: Judge | None
    latents: bool = False
    prompts: Sequence[str] | None = None
    values: dict[str, list[Tensor]] = field(default_factory=dict)  # column -> one value an image, batch by batch
    count: int = 0

    def update(self, made: Made, labels: Tensor, uncached: Made, accurate: Made | None = None) -> None:
        """Adds a batch. labels: [n], those asked for. uncached, accurate: from the same noise."""
        self.count += len(labels)
        if self.judge is not None:
            latents = dict(latents=made.samples, uncached_latents=uncached.samples) if self.latents else {}
            prompts = None if self.judge.clip is None else [self.prompts[label] for label in labels.tolist()]
            self.judge.update(made.images, None if self.judge.extractor is None else labels, uncached=uncached.images,
                              prompts=prompts, **latents)
        else:
            self._add("latent_error", rmse(made.samples, uncached.samples, clip=False))
        if accurate is not None and self.judge is not None:
            self._add("accurate_error", rmse(made.images, accurate.images))
        if accurate is not None and self.latents:
            self._add("accurate_latent_error", rmse(made.samples, accurate.samples, clip=False))

    def _add(self, column: str, values: Tensor) -> None:
        self.values.setdefault(column, []).append(values.double())

    def row(self, method: Method, steps: int, wall_speedup: float | None, seed: int) -> dict:
        """The method's row of `compare`. steps: of the uncached trajectory."""
        judged = dict(samples=self.count) if self.judge is None else self.judge.result()
        return dict(
            name=method.name, family=method.family, steps=method.steps, seed=seed,
            cur=0.0 if method.schedule is None else method.schedule.cur, flops_speedup=method.speedup(steps),
            wall_speedup=wall_speedup) | judged | {
                column: torch.cat(values).mean().item() for column, values in self.values.items()}

    def draws(self) -> dict[str, Tensor]:
        """The bootstrap's values of each column that has them, see `Judge.draws`."""
        own = {column: mean_draws(torch.cat(values)) for column, values in self.values.items()}
        return own if self.judge is None else own | self.judge.draws()


def add_intervals(rows: Sequence[dict], tallies: Sequence[Tally]) -> None:
    """Adds intervals of 95 % to rows of one seed: `error_low`, `error_high` and so on.

    `frechet_above` is how far a Fréchet distance is above that of the first row, the uncached run, with the interval of
    this difference.
    """
    base = tallies[0].draws()
    for row, tally in zip(rows, tallies):
        draws = base if tally is tallies[0] else tally.draws()
        for column in MEANS:
            if column in draws and row[column] is not None:
                row[f"{column}_low"], row[f"{column}_high"] = interval(draws[column], row[column])
        if "frechet" in draws:
            row["frechet_above"] = row["frechet"] - rows[0]["frechet"]
            row["frechet_above_low"], row["frechet_above_high"] = interval(
                draws["frechet"] - base["frechet"], row["frechet_above"])

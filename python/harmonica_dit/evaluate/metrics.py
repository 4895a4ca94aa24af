"""What caching costs: errors to the uncached images, and how real the samples look."""

import contextlib
import json
import math
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchmetrics.image.inception import InceptionScore

from harmonica_dit.files import replacement
from harmonica_dit.validate import describe, shorten

from .bootstrap import frechet_draws, mean_draws
from .extractors import as_bytes, extractor_checksum
from .reference import KEPT, Kept, Reference, frechet_metric

MIN_FRECHET = 2000  # with fewer samples the features' covariance, and so the distance, means nothing
NEIGHBOURS = 3  # k of precision and recall, as in Kynkäänniemi et al., 2019 (arXiv 1904.06991)
SPLITS = 10  # parts of the inception score, as in the code published with Salimans et al., 2016 (arXiv 1606.03498)
SSIM_WINDOW = 11  # pixels


def rmse(images: Tensor, reference: Tensor, clip: bool = True) -> Tensor:
    """Root mean square error of each image [n], images and reference [n, C, H, W] from the same noise.

    Images are clipped to [-1, 1], as a viewer would do: an error of 2 is black for white. clip=False is for latents.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected the reference's {tuple(reference.shape)}")
    if clip:
        images, reference = images.clamp(-1, 1), reference.clamp(-1, 1)
    return (images - reference).square().flatten(1).mean(1).sqrt()


def image_errors(images: Tensor, reference: Tensor) -> dict[str, Tensor]:
    """"error" (RMSE), "psnr" in dB and "ssim" of each image, [n].

    Images and reference [n, C, H, W] are from the same noise, and are clipped to [-1, 1]. The PSNR of equal images is
    infinite. SSIM (Wang et al., 2004) is taken on the scale [0, 1], for it depends on where 0 is; it is left out where
    a side has less than the window's 11 pixels.
    """
    errors = {"error": rmse(images.float(), reference.float())}
    shown, wanted = ((each.float().clamp(-1, 1) + 1) / 2 for each in (images, reference))
    errors["psnr"] = peak_signal_noise_ratio(shown, wanted, data_range=1.0, reduction="none", dim=(1, 2, 3))
    if min(shown.shape[2:]) >= SSIM_WINDOW:
        errors["ssim"] = structural_similarity_index_measure(shown, wanted, data_range=1.0, reduction="none").view(-1)
    return errors


def precision_recall(real: Tensor, samples: Tensor) -> tuple[float, float]:
    """Shares of the samples [n, F] near real features [m, F], and of the real ones near samples, by prdc.

    Near: within the distance of the third neighbour among its own kind (Kynkäänniemi et al., 2019, equation 2). Memory
    is that of three matrices of distances between all pairs.
    """
    from prdc import compute_prdc  # which takes a second to import

    with contextlib.redirect_stdout(None):
        found = compute_prdc(real.float().numpy(), samples.float().numpy(), NEIGHBOURS)
    return float(found["precision"]), float(found["recall"])


class Judge:
    """Judges one method's samples, which `update` takes batch by batch.

    Args:
        extractor: gives features and logits, see `evaluate.extractors`. Without one there are only errors.
        reference: statistics of real images in the extractor's eyes, or the path of their file; without them neither
            Fréchet distances nor precision and recall.
        clip: what `load_clip` gives, for models with prompts; one for all judges.

    Raises:
        ValueError: the reference is of another extractor.
    """

    def __init__(self, extractor: nn.Module | None = None, reference: Reference | str | os.PathLike | None = None,
                 clip: tuple | None = None):
        self.extractor, self.count, self.given = extractor, 0, None
        self.reference = reference if reference is None or isinstance(reference, Reference) else Reference.load(
            reference)
        self.values: dict[str, list[Tensor]] = {}  # of each image, batch by batch
        if self.reference is not None:
            if extractor is None:
                raise ValueError("reference: statistics of real images need the extractor that they are of")
            self.reference.check(extractor)
            self.frechet = frechet_metric(extractor.num_features, self.reference.features)
            self.spatial = frechet_metric(extractor.num_spatial, self.reference.spatial)
        self.kept, self.clip = Kept(), None
        if extractor is not None:
            with warnings.catch_warnings():  # that it keeps the logits, 4 kB an image
                warnings.simplefilter("ignore", UserWarning)
                self.score = InceptionScore(nn.Identity(), splits=SPLITS)
        if clip is not None:
            from torchmetrics.multimodal import CLIPScore

            self.clip = CLIPScore(lambda: clip)

    @torch.inference_mode()
    def update(self, images: Tensor, labels: Tensor | None = None, *, uncached: Tensor | None = None,
               latents: Tensor | None = None, uncached_latents: Tensor | None = None,
               prompts: Sequence[str] | None = None) -> None:
        """Adds samples.

        Args:
            images: [n, C, H, W], floats in [-1, 1]; what lies outside is clipped.
            labels: [n], those asked for; without them there is no label accuracy.
            uncached: the uncached images of the same noise; without them no errors.
            latents, uncached_latents: [n, c, h, w], what the images were decoded from, for the error of latents.
            prompts: n texts, for the CLIP score.

        Raises:
            TypeError, ValueError: something is of another type or shape than this, or than in the batch before;
                images are not finite, or are on the scale [0, 255]; or something is given for a part of the batches.
        """
        extras = dict(labels=labels, uncached=uncached, latents=latents, uncached_latents=uncached_latents,
                      prompts=prompts)
        given = self._check(images, extras)
        errors = {} if uncached is None else image_errors(images, uncached)
        if latents is not None:
            errors["latent_error"] = rmse(latents.float(), uncached_latents.float(), clip=False)
        shown = images.float().clamp(-1, 1)
        if self.clip is not None:
            in_bytes = as_bytes(shown)  # refuses what is no image before anything is added
        if self.extractor is not None:
            device = next(iter(self.extractor.state_dict().values())).device
            features, at_places, logits = (part.cpu() for part in self.extractor.extract(shown.to(device)))
            self.score.update(logits)
            if labels is not None and self.extractor.num_labels is not None:
                errors["label_accuracy"] = (logits.argmax(1) == labels.cpu()).double()
            if self.reference is not None:
                self.frechet.update(features, real=False)
                self.spatial.update(at_places, real=False)
                self.kept.add(features)
        if self.clip is not None:
            self.clip.update(in_bytes, list(prompts))
        for name, values in errors.items():
            self.values.setdefault(name, []).append(values.double().cpu())
        self.count += len(images)
        self.given = given

    def _check(self, images: Tensor, extras: dict) -> tuple:
        """What this batch has to have in common with the others. Leaves shapes to the errors, which refuse them."""
        for name, value in (("images", images), *extras.items()):
            if value is not None and name not in ("labels", "prompts"):
                check_floats(name, value, len(images))
        if images.min() >= 0 and (mean := images.mean().item()) > 2:  # a sampler that diverges goes below 0 as well
            raise ValueError(f"images: their mean is {mean:.3g} and none is below 0, expected values in [-1, 1], not 0 "
                             "to 255")
        given = (tuple(images.shape[1:]), *(name for name, value in extras.items() if value is not None))
        if self.given not in (None, given):
            raise ValueError(f"images: got shape and company {given}, expected {self.given} as in the first batch")
        if (extras["latents"] is None) != (extras["uncached_latents"] is None):
            raise ValueError("latents: they are compared with uncached_latents; give both or neither")
        if extras["labels"] is not None:
            check_judged_labels(extras["labels"], len(images), getattr(self.extractor, "num_labels", None))
        prompts = extras["prompts"]
        if (prompts is None) != (self.clip is None):
            raise ValueError("prompts: the CLIP score needs them, and a CLIP (`load_clip`); give both or neither")
        if prompts is not None and (isinstance(prompts, str) or len(prompts) != len(images)):
            raise ValueError(f"prompts: got {shorten(prompts)}, expected {len(images)} texts")
        return given

    @property
    def frechet_distance(self) -> float | None:
        """Fréchet distance to the real images (FID: Heusel et al., 2017, arXiv 1706.08500); None of too few samples.

        Too few: below `MIN_FRECHET`, or no more than there are features, for then their covariance is singular.
        """
        return self.frechet.compute().item() if self._enough else None

    @property
    def spatial_frechet_distance(self) -> float | None:
        """The same of spatial features (sFID: Nash et al., 2021, arXiv 2103.03841)."""
        return self.spatial.compute().item() if self._enough else None

    @property
    def inception_score(self) -> float | None:
        """exp of the mean KL divergence of a sample's classes from all samples' (Salimans et al., 2016).

        The mean over ten parts, as is usual; None below `MIN_FRECHET` samples.
        """
        if self.extractor is None or self.count < MIN_FRECHET:
            return None
        with torch.random.fork_rng(devices=()):  # torchmetrics mixes the samples before it parts them
            torch.manual_seed(0)
            return self.score.compute()[0].item()

    @property
    def precision_recall(self) -> tuple[float, float] | None:
        """See `precision_recall`, of at most `KEPT` samples and real images; None where the distances are."""
        return precision_recall(self.reference.kept, self.kept.stack()) if self._enough else None

    @property
    def label_accuracy(self) -> float | None:
        """Share of the samples to which the extractor gives the label asked for; None if it does not know labels."""
        return self._mean("label_accuracy")

    @property
    def _enough(self) -> bool:
        if self.reference is None:
            return False
        return self.count >= MIN_FRECHET and self.count > max(self.extractor.num_features, self.extractor.num_spatial)

    def _mean(self, name: str) -> float | None:
        """Over images; None where there are no values, or an infinite one."""
        mean = torch.cat(self.values[name]).mean().item() if name in self.values else math.inf
        return mean if math.isfinite(mean) else None

    def result(self) -> dict[str, float | None]:
        """All figures by name, ready for JSON: those of docs/design.md, section 12.

        None is what there is nothing for: no uncached images, latents, labels, prompts, extractor or reference; too
        few samples; PSNR where an image equals the uncached one; SSIM of images below 11 pixels.
        """
        precision, recall = self.precision_recall or (None, None)
        means = {name: self._mean(name) for name in ("error", "psnr", "ssim", "latent_error", "label_accuracy")}
        return dict(samples=self.count, **means, frechet=self.frechet_distance,
                    spatial_frechet=self.spatial_frechet_distance, inception_score=self.inception_score,
                    precision=precision, recall=recall,
                    clip_score=None if self.clip is None else self.clip.compute().item())

    def draws(self) -> dict[str, Tensor]:
        """Bootstrap's values [RESAMPLES] of those figures that are means over images, and of "frechet".

        For `bootstrap.interval`. "frechet" is left out above `KEPT` samples, for then not all features are there.
        """
        drawn = {name: mean_draws(torch.cat(values)) for name, values in self.values.items()
                 if self._mean(name) is not None}
        if self._enough and self.count <= KEPT:
            drawn["frechet"] = frechet_draws(self.kept.stack(), self.reference.features)
        return drawn


def check_floats(name: str, value, count: int) -> None:
    """Refuses all but `count` finite images [count, C, H, W], or latents [count, …]: some models have tokens."""
    expected, dims = ("[n, …]", range(2, 8)) if "latents" in name else ("[n, C, H, W]", (4,))
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim not in dims or not value.numel():
        raise TypeError(f"{name}: got {describe(value)}, expected floats {expected}")
    if len(value) != count:
        raise ValueError(f"{name}: got {len(value)}, expected one for each of {count} images")
    if broken := count - int(value.isfinite().flatten(1).all(1).sum()):
        raise ValueError(f"{name}: {broken} of {count} hold values that are not finite")


def check_judged_labels(labels, count: int, num_labels: int | None) -> None:
    """Refuses all but `count` labels; where the extractor knows them, they are from 0 to num_labels - 1."""
    if not isinstance(labels, Tensor) or labels.dtype != torch.long or labels.shape != (count,):
        raise ValueError(f"labels: got {describe(labels)}, expected {count} whole numbers (int64)")
    if num_labels is not None and not 0 <= labels.min() <= labels.max() < num_labels:
        raise ValueError(f"labels: got {labels.min()} to {labels.max()}, the extractor knows 0 to {num_labels - 1}")


def cached_floor(path: str | os.PathLike, extractor: nn.Module, reference: Reference,
                 batches: Iterable[tuple[Tensor, Tensor]], data: str) -> dict[str, float | None]:
    """What real images that are not in the reference score themselves: no method can be expected to do better.

    Args:
        path: a JSON file. Where it holds the figures of this extractor, reference and data, batches are not read.
        batches: (images [n, C, H, W] in [-1, 1], labels [n]). data: their checksum, see `data_checksum`.

    Returns:
        `Judge.result` of them. A Fréchet distance falls with the number of samples, so fewer samples score worse.
    """
    of = dict(extractor=extractor_checksum(extractor), reference=reference.data, data=data)
    if Path(path).is_file():
        found = json.loads(Path(path).read_text())
        if found["of"] == of:
            return found["scores"]
    judge = Judge(extractor, reference)
    for images, labels in batches:
        judge.update(images, labels)
    scores = judge.result()
    with replacement(path) as temporary:
        temporary.write_text(json.dumps(dict(of=of, scores=scores), indent=1) + "\n")
    return scores

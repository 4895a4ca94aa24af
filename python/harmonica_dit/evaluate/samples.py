"""Samples kept on disk: a comparison goes on where it stopped, and its metrics can be taken anew."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from harmonica_dit import ranks
from harmonica_dit.adaptive import AdaptiveSchedule
from harmonica_dit.files import load_tensors, remove_leftovers, save_tensors
from harmonica_dit.sample import sample
from harmonica_dit.sample.schedulers import make_scheduler
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import is_number
from harmonica_kernels.graphs.weights import stored

from .named_methods import Method

PAUSE = 0.2  # seconds between two looks at what another process makes


class Samples:
    """What methods make of the same labels and noise: a folder for each method and seed, in it a file for each batch.

    What decides the samples is in a folder's name, as a checksum, so that another model, method, seed or guidance finds
    nothing. Latents are kept as they are, not decoded.

    Args:
        net: a denoiser.
        labels: [n], of the images 0, 1, … of a seed.
        folder: may be used by several processes at once.
        guidance, scheduler, batch: as in `harmonica_dit.sample`.
        run: names the run that makes them, where it times them; "" does not time them.
    """

    def __init__(self, net, labels: Tensor, folder: Path, *, guidance: float, scheduler="ddim", batch: int = 64,
                 run: str = ""):
        self.net, self.labels, self.folder = net, labels, folder
        self.guidance, self.scheduler, self.batch, self.run = guidance, scheduler, batch, run
        self._weights: dict[int, str] = {}  # a model's id -> checksum of its weights
        self._places: dict[tuple[int, int], tuple[Method, Path]] = {}  # by a method's id and seed

    @property
    def firsts(self) -> range:
        """The number of each batch's first image."""
        return range(0, len(self.labels), self.batch)

    def make(self, methods: Sequence[Method], seeds: Sequence[int], progress: Callable[[int], None]) -> None:
        """Makes what is missing: one batch by every method, then the next batch, so that timings are interleaved.

        A batch that another process makes is waited for; if that process dies, it is made here. Of several ranks each
        makes every so many-th batch, and waits for the others in the end.

        Args:
            progress: called with the number of images that are there, of all methods and seeds; the other ranks are
                taken to be as far as this one.

        Raises:
            OSError: what another rank has made is not seen here.
        """
        keys = [(method, seed, first) for seed in seeds for first in self.firsts for method in methods]
        counts = [len(self.labels_of(first)) for _, _, first in keys]
        done, missing = 0, list(range(ranks.rank(), len(keys), ranks.world()))
        while missing:
            rest = []
            for i in missing:
                if self.read(*keys[i]) is None and not self._make(*keys[i]):
                    rest.append(i)
                    continue
                done += sum(counts[i - ranks.rank() :][: ranks.world()])
                progress(done)
            missing = rest
            if missing:
                time.sleep(PAUSE)
        ranks.barrier()
        for path in (self._path(*key) for key in keys):
            if not path.exists():
                raise OSError(f"folder: another rank has made {path}, which is not seen here; give a folder that all "
                              "machines share")

    def batches(self, method: Method, seed: int) -> Iterator[Tensor]:
        """The samples [n, C, H, W] batch by batch; what is missing is made."""
        for first in self.firsts:
            while (found := self.read(method, seed, first)) is None:
                if not self._make(method, seed, first):
                    time.sleep(PAUSE)
            yield found[0]

    def seconds(self, method: Method, seed: int) -> dict[int, float]:
        """How long each batch that this run has made took, by its first image's number."""
        found = {first: self.read(method, seed, first)[1] for first in self.firsts}
        return {first: about["seconds"] for first, about in found.items() if about["run"] == self.run != ""}

    def as_run(self, method: Method, seed: int) -> Method:
        """The method; where its schedule is adaptive, with account of what these samples took, all of which are there.
        """
        if not isinstance(method.schedule, AdaptiveSchedule):
            return method
        ran = [row for first in self.firsts for row in self.read(method, seed, first)[1]["ran"]]
        return replace(method, schedule=replace(method.schedule, ran=ran))

    def read(self, method: Method, seed: int, first: int) -> tuple[Tensor, dict] | None:
        """A batch that is kept, and what is noted of it; None if there is none for these labels."""
        path, labels = self._path(method, seed, first), self.labels_of(first).tolist()
        if not path.exists():
            return None
        tensors, about = load_tensors(path)
        images, theirs = tensors.get("images"), about.get("labels")
        whole = images is not None and isinstance(theirs, list) and tuple(images.shape) == (
            len(theirs), *self.net.sample_shape) and is_number(about.get("seconds")) and "run" in about
        if not whole or ("ran" in about) != isinstance(method.schedule, AdaptiveSchedule):
            raise ValueError(f"{path} is no whole batch of samples; remove it, and it is made again")
        return (images[: len(labels)], about) if theirs[: len(labels)] == labels else None

    def _make(self, method: Method, seed: int, first: int) -> bool:
        """Makes a batch; False if another process is at it."""
        path = self._path(method, seed, first)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(path.with_suffix(".lock"), blocking=False):
                remove_leftovers(path.parent, path.name)
                if self.read(method, seed, first) is None:
                    adaptive, schedule = isinstance(method.schedule, AdaptiveSchedule), method.schedule
                    if adaptive:
                        schedule = replace(schedule, ran=[])  # with an account of its own
                    labels, start = self.labels_of(first), time.perf_counter()
                    made = sample(method.model(self.net), labels, steps=method.steps, schedule=schedule, seed=seed,
                                  first=first, scheduler=method.scheduler or self.scheduler,
                                  guidance=self.guidance, batch=self.batch, latents=True).cpu()
                    save_tensors(path, {"images": made}, dict(
                        labels=labels.tolist(), method=method.name, run=self.run, process=os.getpid(),
                        seconds=time.perf_counter() - start) | (dict(ran=schedule.ran) if adaptive else {}))
        except Timeout:
            return False
        path.with_suffix(".lock").unlink(missing_ok=True)
        return True

    def labels_of(self, first: int) -> Tensor:
        """Of the batch that begins with this image."""
        return self.labels[first : first + self.batch]

    def _path(self, method: Method, seed: int, first: int) -> Path:
        key = id(method), seed  # not its name, which others may have
        if key not in self._places:
            self._places[key] = method, self.folder / self.digest(method, seed)  # it lives, so its id is its own
        return self._places[key][1] / f"{first}.safetensors"

    def digest(self, method: Method, seed: int) -> str:
        """Checksum of everything that decides the samples, but for the labels."""
        net = method.model(self.net)
        if id(net) not in self._weights:
            self._weights[id(net)] = weights_checksum(net)
        made = make_scheduler(method.scheduler or self.scheduler, method.steps, net)
        config = {name: str(value) for name, value in made.config.items() if not name.startswith("_")}
        about = [] if method.net is None else [net.name]  # of a pruned copy it says how many heads the weights make
        about += [self._weights[id(net)], type(made).__name__, config, method.steps, seed, self.guidance]
        tables = []
        if method.schedule is not None:
            settings, tables = content(method.schedule)
            about += settings
        if isinstance(method.schedule, AdaptiveSchedule):
            about += [self.batch]  # which is decided on as a whole
        return checksum(tables, json.dumps(about, sort_keys=True))


def content(schedule: Schedule | AdaptiveSchedule) -> tuple[list, list[Tensor]]:
    """What of a schedule decides the images: settings, as JSON takes them, and tables."""
    if isinstance(schedule, AdaptiveSchedule):
        return [schedule.runs, schedule.threshold], []
    settings = [schedule.timesteps, getattr(schedule.forecaster, "order", None)]
    settings += [] if schedule.runs is None else [schedule.runs]
    tables = [schedule.compute, schedule.extrapolation]
    if schedule.forecaster is not None:
        tables += [t for t in vars(schedule.forecaster).values() if isinstance(t, Tensor)]
    return settings, tables


def weights_checksum(net) -> str:
    """Of a model's weights, and of what a quantized one does beside them: the same int8 with and without activations.
    """
    weights = [tensor for name, tensor in net.state_dict().items() if not name.startswith("vae.")]
    kinds = [repr((type(t).__name__, t.__tensor_flatten__())) for t in weights if hasattr(t, "__tensor_flatten__")]
    return checksum([part for tensor in weights for part in stored(tensor)], "".join(kinds))


def checksum(tensors: Sequence[Tensor], text: str = "") -> str:
    """Of tensors' bytes and a text: 16 hexadecimal digits."""
    found = hashlib.sha256(text.encode())
    for tensor in tensors:
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()[:16]

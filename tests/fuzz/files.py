"""Targets that read a file. Each is given a file's path and says whether what came in passed the first check.

The first check is that the file is whole: safetensors with metadata that is JSON, JSON, text in UTF-8, a checkpoint of
plain tensors. What is accepted is used afterwards, and then nothing may fail.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random

import torch

from harmonica_dit.costs import Seconds
from harmonica_dit.evaluate.named_methods import Method
from harmonica_dit.evaluate.reference import Reference
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.files import load_tensors
from harmonica_dit.flops import Flops
from harmonica_dit.load import read_checkpoint, read_weights
from harmonica_dit.models import DiT
from harmonica_dit.pipelines.conditions import Encoder
from harmonica_dit.pipelines.prompts import Prompts, read_texts
from harmonica_dit.published_routers import load_published_router
from harmonica_dit.router import Router, read
from harmonica_dit.schedule import Schedule
from harmonica_dit.train.checkpoint import Training
from harmonica_dit.train.log import Log

from .campaign import Outcome
from .mutate import CODE_HAS_RUN, change_json_file, change_pt, change_safetensors, change_text

CORPUS = Path(__file__).parent / "corpus"
T, K = 4, 4


@dataclass(frozen=True)
class FileTarget:
    """use: reads the file and uses what it holds. whole: the first check. change: how the file is changed.

    file: its name.
    """

    use: Callable[[Path], None]
    whole: Callable[[Path], object]
    change: Callable[[bytes, Random], bytes]
    file: str = "hostile.safetensors"
    errors: tuple[type[Exception], ...] = (ValueError,)

    def __call__(self, path: Path) -> Outcome:
        """What became of a file.

        Raises:
            AssertionError: an error does not name the file. Others: what the code does not promise to raise.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.whole(path)
            except (*self.errors, RecursionError) as error:  # Python's own reader of JSON raises the latter
                return Outcome(False, error)
            try:
                self.use(path)
            except self.errors as error:
                if path.name not in str(error):
                    raise AssertionError(f"the message does not name the file: {error!s:.200}") from error
                return Outcome(True, error)
        return Outcome(True, None)


def corpus(name: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def use_schedule(schedule: Schedule) -> None:
    """What sampling and the commands take of it, and its file once more."""
    assert len(schedule.rows) == len(schedule.forecast_weights) == schedule.steps
    assert 0 <= schedule.cur <= 1 and 0 < schedule.speedup < math.inf
    assert schedule.new_cache().history == schedule.history
    assert repr(schedule) and schedule.nothing_gained() != ""
    str(schedule.origin + schedule.model).encode()


def read_router(path: Path) -> None:
    router = Router.load(path)
    use_schedule(router.schedule())
    again = path.with_name("again.safetensors")
    router.save(again)
    assert torch.equal(Router.load(again).scores(), router.scores())


def read_schedule(path: Path) -> None:
    schedule = read(path)
    if isinstance(schedule, Router):
        return
    use_schedule(schedule)
    again = path.with_name("again.safetensors")
    schedule.save(again)
    assert Schedule.load(again).rows == schedule.rows


def read_prompts(path: Path) -> None:
    prompts = Prompts.load(path)
    assert prompts.checksum and isinstance(prompts.model.encode(), bytes)
    prompts.conditions(torch.arange(len(prompts.texts) + 1), torch.float32)


def read_encoded(path: Path) -> None:
    encoder = Encoder(lambda prompt: None)
    encoder.load(path, {"model": "tiny"})


def read_costs(path: Path) -> None:
    costs, schedule = Seconds.load(path), every_second(K)
    if len(costs.branches) == K:
        assert 0 < schedule.speedup_by(costs) < math.inf and costs.of_router(True).total >= 0


@cache
def every_second(K: int) -> Schedule:
    compute = torch.ones(T, K, dtype=torch.bool)
    compute[1::2, : K // 2] = False
    return Schedule(compute, tuple(f"blocks.{k}" for k in range(K)), Flops((1.0,) * K, 1.0))


@cache
def net() -> DiT:
    torch.manual_seed(0)
    return DiT(input_size=4, patch_size=2, in_channels=1, hidden_size=8, depth=2, num_heads=2, num_classes=3,
               learn_sigma=False, name="tiny").eval().requires_grad_(False)


def read_samples(path: Path) -> None:
    """A batch that a comparison goes on from."""
    samples, method = Samples(net(), torch.tensor([0, 1]), path.parent, guidance=1.0), Method("a", "a", 4)
    samples._path = lambda *which: path
    found = samples.read(method, 0, 0)
    if found is not None:
        assert found[0].shape == (2, *net().sample_shape)
        samples.seconds(method, 0)


def training() -> Training:
    """As `train_router` begins."""
    torch.manual_seed(0)
    router = Router(torch.zeros(3, 2), ("a.attn", "a.mlp"), Flops((1.0, 2.0), 1.0), (999, 500, 0))
    optimizer = torch.optim.AdamW(router.parameters(), lr=0.01)
    return Training(router, optimizer, torch.ones(3), None, 0.1)


def read_training(path: Path) -> None:
    going_on = training()
    going_on.restore(path, {"seed": 0})
    for parameter in going_on.router.parameters():
        parameter.grad = torch.ones_like(parameter)
    going_on.optimizer.step()


def read_reference(path: Path) -> None:
    found = Reference.load(path)
    assert found.features.covariance.shape == (len(found.features.mean),) * 2 and found.features.count > 1


def read_log(path: Path) -> None:
    """The CSV that a training goes on with."""
    with Log(path.parent, total=9, first=3, progress=False):
        pass


def read_plain(path: Path) -> None:
    try:
        read_checkpoint(path)
    finally:
        assert not Path(CODE_HAS_RUN).exists()


def read_published(path: Path) -> None:
    router = load_published_router(path, "harmonica", net=net())
    use_schedule(router.schedule())


def read_labels_and_texts(path: Path) -> None:
    assert all(text.strip() for text in read_texts(path))


TARGETS = {
    "router": FileTarget(read_router, load_tensors, change_safetensors),
    "schedule": FileTarget(read_schedule, load_tensors, change_safetensors),
    "forecast": FileTarget(read_schedule, load_tensors, change_safetensors),
    "prompts": FileTarget(read_prompts, load_tensors, change_safetensors),
    "encoded": FileTarget(read_encoded, load_tensors, change_safetensors),
    "samples": FileTarget(read_samples, load_tensors, change_safetensors),
    "training": FileTarget(read_training, load_tensors, change_safetensors),
    "reference": FileTarget(read_reference, load_tensors, change_safetensors),
    "weights": FileTarget(read_weights, read_checkpoint, change_safetensors),
    "published": FileTarget(read_published, read_plain, change_pt, "hostile.pt"),
    "costs": FileTarget(read_costs, lambda path: json.loads(path.read_text()), change_json_file, "hostile.json"),
    "texts": FileTarget(read_labels_and_texts, lambda path: path.read_text("utf-8"), change_text, "hostile.txt"),
    "csv": FileTarget(read_log, lambda path: path.read_text("utf-8"), change_text, "log.csv"),
}

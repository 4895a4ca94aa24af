"""Trainings and samplings that several ranks share: the same results as with one, and an end where a rank ends."""

import json
import os
import subprocess
import sys
import time
import warnings
from collections import Counter
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

import harmonica_dit
import harmonica_dit.train.targets as targets
from harmonica_dit import ranks
from harmonica_dit.cli import app
from harmonica_dit.evaluate import compare
from harmonica_dit.evaluate.named_methods import Method, fora_methods
from harmonica_dit.files import load_tensors
from harmonica_dit.methods import step_search
from harmonica_dit.progress import progress_bar
from harmonica_dit.train import train_forecaster, train_router
from support import ranked
from support.tiny_dit import tiny

pytestmark = pytest.mark.filterwarnings("ignore:target_", "ignore:soft_share")  # a dozen entries meet no target
# batches that neither 2 nor 4 ranks share evenly; λ is measured twice, its mean of "gain" is a quotient
ROUTER = dict(steps=4, batch=5, trajectories=4, lr=0.05, target_speedup=1.5, importance="gain", refresh=8,
              extrapolation="learned", halves="both", guidance_channels=1, progress=False)
# of the held-out images a last part of 2, so that of 4 ranks some have none; targets of 3 files
FORECAST = dict(steps=4, target="uncached", perceptual=0.5, iterations=4, images=5, held_out=7, batch=5, lr=0.02,
                progress=False)
PART = 5
MODEL = "--model", "support.tiny_dit:tiny"
SAMPLES = dict(steps=4, seeds=(3, 4), batch=4, guidance=1.5)


def tensors_of(made):
    found = made.state_dict() if hasattr(made, "state_dict") else vars(made.forecaster)
    return {name: t.clone() for name, t in found.items() if isinstance(t, torch.Tensor)}


def train(out, **more):
    """A router and a forecaster, as tensors by name, and how the router came out."""
    net, targets.PART = tiny(), PART
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        router = train_router(net, **ROUTER | more, out=out and out / "router")
    forecast = train_forecaster(net, 1.8, **FORECAST, out=out and out / "forecast")
    return tensors_of(router), tensors_of(forecast), (router.threshold, router.beta), [str(w.message) for w in said]


def sample(out):
    net = tiny()
    return compare(net, fora_methods(net, 4, 2), torch.arange(11) % 4, folder=out, **SAMPLES)


def both(out):
    return *train(out), sample(out / "samples")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process's results, and its folder."""
    out = tmp_path_factory.mktemp("alone")
    part = targets.PART
    yield *both(out), out
    targets.PART = part


@pytest.fixture(scope="module", params=[2, 4])
def shared(request, tmp_path_factory):
    """The same of several ranks: results rank by rank, and their folder."""
    out = tmp_path_factory.mktemp("shared")
    found = ranked.run(request.param, both, out)
    assert not [error for error in found if isinstance(error, Exception)]
    return found, out


def assert_near(found, expected, atol):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=atol)


def test_ranks_learn_what_one_process_learns(alone, shared):
    (router, forecast, (threshold, beta), *_), (ranks_own, _) = alone, shared
    for own in ranks_own:
        assert_near(own[0], router, 1e-3)
        assert_near(own[1], forecast, 1e-3)
        assert own[2] == (pytest.approx(threshold, abs=1e-3), pytest.approx(beta, rel=1e-3))
        assert_near(own[0], ranks_own[0][0], 0)
        assert_near(own[1], ranks_own[0][1], 0)
    kept, whole = (load_tensors(out / "forecast/checkpoint.safetensors")[1] for out in (shared[1], alone[-1]))
    assert [kept[name] for name in ("loss", "error")] == pytest.approx([whole["loss"], whole["error"]], rel=1e-5)


def test_targets_have_the_same_noise_and_labels(alone, shared):
    """Each file is made by one rank, as many at a time as it has images in an iteration."""
    one, many = (sorted((out / "forecast").glob("targets-*/*.safetensors")) for out in (alone[-1], shared[1]))
    assert [path.name for path in one] == [path.name for path in many] == ["0.safetensors", "10.safetensors",
                                                                           "5.safetensors"]
    for path, own in zip(one, many):
        (images, about), (found, its) = load_tensors(path), load_tensors(own)
        assert about == its
        torch.testing.assert_close(found["images"], images["images"], rtol=0, atol=1e-5)


def test_samples_are_the_same(alone, shared):
    one, many = (sorted(p.relative_to(out) for p in (out / "samples").rglob("*.*")) for out in (alone[-1], shared[1]))
    assert one == many and len(one) == 2 * 3 * 3  # seeds, methods, batches
    makers = Counter()
    for path in one:
        (own, about), (expected, _) = (load_tensors(out / path) for out in (shared[1], alone[-1]))
        assert torch.equal(own["images"], expected["images"])
        makers[about["process"]] += 1
    share = len(one) / len(shared[0])
    assert len(makers) == len(shared[0]) and all(abs(count - share) < 1 for count in makers.values())
    for found in shared[0]:
        for row, expected in zip(found[4], alone[4], strict=True):
            assert row["error"] == expected["error"] and row["wall_speedup"] is None


def test_rank_0_alone_writes_and_warns(alone, shared):
    names = [sorted(p.name.split(".")[0] for p in (out / "router").iterdir()) for out in (alone[-1], shared[1])]
    assert names[0] == names[1]
    lines = [(out / "router/log.csv").read_text().count("\n") for out in (alone[-1], shared[1])]
    assert lines[0] == lines[1] == 1 + ROUTER["trajectories"]
    said = [found[3] for found in shared[0]]
    assert said[0] and said[0] == alone[3] and not any(said[1:])


def test_a_training_goes_on_with_another_number_of_ranks(alone, tmp_path):
    """1, then 4, then 2 ranks; what rank 0 does not see, no rank needs."""
    train_router(tiny(), **ROUTER | dict(trajectories=2), out=tmp_path / "run")
    ranked.run(4, resume, tmp_path / "run", 3)
    found = ranked.run(2, resume, tmp_path / "run", 4)
    for own in found:
        assert_near(own, alone[0], 1e-3)


def resume(out, trajectories):
    if ranks.rank():
        out = out.parent / "of another machine"
    return tensors_of(train_router(tiny(), **ROUTER | dict(trajectories=trajectories), out=out))


class Sealed(Exception):
    """Cannot be made again from what it is pickled to."""

    def __init__(self, a, b):
        super().__init__(f"{a} {b}")


def raise_sealed():
    raise Sealed("of", "rank 0")


def refuse():
    said = []
    for call in (lambda: train_router(tiny(), **ROUTER | dict(batch=1)),
                 lambda: train_forecaster(tiny(), 1.8, **FORECAST | dict(batch=1)),
                 lambda: compare(tiny(), [], [0], steps=2),
                 lambda: ranks.on_main(lambda: 1 // (not ranks.is_main()))):
        with pytest.raises((ValueError, ZeroDivisionError)) as raised:
            call()
        said.append(str(raised.value))
    with pytest.raises((Sealed, RuntimeError)) as raised:
        ranks.on_main(raise_sealed)
    assert str(raised.value) == ("of rank 0" if ranks.is_main() else "rank 0: Sealed: of rank 0")
    assert progress_bar(Console(force_terminal=True)).disable == bool(ranks.rank())
    if ranks.rank() == 1:
        raise RuntimeError("of this rank")
    try:
        ranks.mean([torch.ones(2)], 1)
    except ConnectionError as error:
        return [*said, str(error)]


def test_what_is_wrong_is_said_by_all_and_a_rank_that_fails_keeps_none_waiting():
    (*said, gone), failed = ranked.run(2, refuse)
    assert said == ["batch: got 1, expected at least one image for each of the 2 ranks"] * 2 + [
        "processes, folder: got 1 and None; 2 ranks are processes already, and need a folder that all see",
        "integer division or modulo by zero"]
    assert gone.startswith("another of the 2 ranks has ended, or was not heard of in time (")
    assert isinstance(failed, RuntimeError)


def wait():
    """What rank 0 is waited for, which rank is first, and whether a rank that is late is waited for."""
    ranks.PATIENCE = timedelta(seconds=1.5)
    found = []
    try:
        with ranks.launched():
            found.append(ranks.on_main(lambda: time.sleep(2) or "waited for"))
            found.append(ranks.main_first(lambda: time.sleep(0.2 * ranks.is_main()) or time.monotonic()))
            if ranks.rank() == 1:
                time.sleep(2.5)
            ranks.mean([torch.ones(2)], 1)
    except ConnectionError:
        return [*found, "not waited for"]


def test_who_waits_for_whom():
    """Long for what rank 0 does alone, not for long where all do the same."""
    (*first, late), (*second, _) = ranked.run(2, wait, join=False)
    assert first[0] == second[0] == "waited for" and first[1] < second[1] and late == "not waited for"


def join_late(file):
    """Whether rank 1, for whom joining takes longer, has joined when the work begins."""
    make = dist.new_group

    def make_late(**options):
        made = make(**options)
        if ranks.rank() == 1:
            time.sleep(1)
            file.touch()
        return made

    dist.new_group = make_late
    with ranks.launched():
        return file.exists()


def test_the_work_begins_when_every_rank_has_joined(tmp_path):
    """Or a rank that refuses it at once would end while another still joins, which would then say something else."""
    assert ranked.run(2, join_late, tmp_path / "joined", join=False) == [True, True]


def command(words):
    """Exit status, stdout and stderr."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.stdout, result.stderr


def commanded(*words):
    return ranked.run(2, command, words, join=False)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 3], [2]])  # of one image a rank has none
def test_sample(tmp_path, labels):
    (code, said, _), other = commanded("sample", *MODEL, "--labels", ",".join(map(str, labels)), "--steps", 3,
                                       "--seed", 2, "--out", tmp_path / "x.safetensors")
    assert code == 0 and f"{len(labels)} image" in said and other[:2] == (0, "")
    expected = harmonica_dit.sample(tiny(), labels, steps=3, seed=2)
    own = load_tensors(tmp_path / "x.safetensors")[0]["samples"]
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-5)


def test_compare(tmp_path):
    (code, said, _), other = commanded("compare", *MODEL, "--samples", 5, "--batch", 2, "--steps", 4, "--method",
                                       "step-search", "--speedup", 1.4, "--out", tmp_path)
    assert code == 0 and "steps searched" in said and other[:2] == (0, "")
    net = tiny()
    found = Method("searched", "", 4, step_search(net, 4, speedup=1.4, guidance=net.guidance))
    expected = compare(net, [found], torch.arange(5) % 4, steps=4, batch=2, guidance=net.guidance)[1]
    assert json.loads((tmp_path / "rows.json").read_text())["rows"][1]["error"] == expected["error"]


@pytest.mark.parametrize("words, said", [
    (("train", "--model", "fashion-dit", "--device", "cuda:1", "--out", "x"),
     "--device: got cuda:1, but each of 2 ranks has its own; leave the number out"),
    (("show", "fashion-dit-2.0x"), "show runs in one process; train, sample, compare run in many")])
def test_commands_that_are_refused(words, said):
    (code, _, first), (_, stdout, second) = commanded(*words)
    assert code == 2 and first == f"harmonica: rank 0: {said}\n"
    assert stdout == "" and second.startswith("harmonica: rank 1: ")


def test_a_rank_that_dies_ends_the_run_which_then_goes_on_alone(tmp_path):
    """Under torchrun; rank 1 is killed in the last trajectory."""
    (tmp_path / "dying.py").write_text("""import itertools, os, signal
from support import ranked
from support.tiny_dit import tiny
def make():
    net, calls = tiny(), itertools.count()
    def die(*_):
        if next(calls) == 40:
            os.kill(os.getpid(), signal.SIGKILL)
    if os.environ["RANK"] == "1":
        net.register_forward_pre_hook(die)
    return net
""")
    options = dict(steps=4, trajectories=6, batch=3, importance="none", beta=1e-4)
    words = [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python",
                          sys.executable, "-c", "from harmonica_kernels._command import main; main()", "train",
                          "--model=dying:make", f"--out={tmp_path / 'run'}", *words], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300, env=os.environ | dict(PYTHONPATH=os.pathsep.join(sys.path),
                                                                     CUDA_VISIBLE_DEVICES=""))
    assert run.returncode != 0
    assert "harmonica: rank 0: " in run.stderr and "5 of 6 trajectories; the same call goes on from" in run.stderr
    assert load_tensors(tmp_path / "run/checkpoint.safetensors")[1]["trajectory"] == 5
    resumed, whole = (train_router(tiny(), **options, progress=False, out=out)
                      for out in (tmp_path / "run", None))
    assert_near(tensors_of(resumed), tensors_of(whole), 1e-3)

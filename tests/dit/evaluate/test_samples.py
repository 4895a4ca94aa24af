"""Samples that are kept: found again, never mixed up, made once whoever makes them."""

import threading
from dataclasses import replace

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from filelock import FileLock

import harmonica_dit
from harmonica_dit.evaluate import Method, samples
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.forecaster import BranchForecaster
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.sample import sample
from harmonica_dit.sample.schedulers import NOISE

FEW = Method("two steps", "few", 2)


@pytest.fixture(scope="module")
def fashion():
    return harmonica_dit.load("fashion-dit")


def kept(net, folder, labels=3, **changes):
    return Samples(net, torch.arange(labels), folder, **dict(guidance=1.5, batch=2) | changes)


def test_what_is_kept_is_not_made_again(fashion, tmp_path, monkeypatch):
    made = list(kept(fashion, tmp_path).batches(FEW, 3))
    assert [len(part) for part in made] == [2, 1]
    torch.testing.assert_close(torch.cat(made), sample(fashion, range(3), steps=2, seed=3, guidance=1.5))
    monkeypatch.setattr(samples, "sample", lambda *_, **__: pytest.fail("sampled again"))
    again = torch.cat(list(kept(fashion, tmp_path).batches(replace(FEW, name="renamed"), 3)))
    assert torch.equal(torch.cat(made), again)
    assert torch.equal(torch.cat(list(kept(fashion, tmp_path, labels=1).batches(FEW, 3))), again[:1])


def test_methods_of_one_name_are_not_mixed_up(fashion, tmp_path):
    samples = kept(fashion, tmp_path)
    first = next(samples.batches(FEW, 0))
    assert not torch.equal(first, next(samples.batches(replace(FEW, steps=3), 0)))
    assert torch.equal(first, next(samples.batches(FEW, 0)))


def test_other_labels_are_made_anew(fashion, tmp_path):
    list(kept(fashion, tmp_path).batches(FEW, 0))
    other = Samples(fashion, torch.tensor([5, 1, 2]), tmp_path, guidance=1.5, batch=2)
    assert other.read(FEW, 0, 0) is None and other.read(FEW, 0, 2) is not None
    torch.testing.assert_close(next(other.batches(FEW, 0)), sample(fashion, [5, 1], steps=2, guidance=1.5))


def test_all_that_decides_the_samples_is_in_the_checksum(fashion, tmp_path):
    plain, adams = (trunk_forecast(fashion, 4, every=2, adams=a) for a in (False, True))
    branches = fora(fashion, 4, 2)
    methods = [Method("", "", 4), Method("", "", 5), Method("", "", 4, plain), Method("", "", 4, adams),
               Method("", "", 4, replace(plain, timesteps=(900, 600, 300, 50))), Method("", "", 4, branches),
               Method("", "", 4, replace(branches, runs=(8, 8))), Method("", "", 4, replace(branches, runs=(16,))),
               Method("", "", 4, fora(fashion, 4, 2, 1)), Method("", "", 4, fora(fashion, 4, 2, 2)),
               Method("", "", 4, replace(branches, forecaster=BranchForecaster(3))),
               *(Method("", "", 4, scheduler=DPMSolverMultistepScheduler(**NOISE, solver_order=k)) for k in (2, 3)),
               *(Method("", "", 4, replace(plain, forecaster=replace(plain.forecaster, condition=c)))
                 for c in (torch.zeros(4, 1), torch.ones(4, 1)))]
    found = {kept(fashion, tmp_path).digest(method, 0) for method in methods}
    other = harmonica_dit.load("fashion-dit")
    with torch.no_grad():
        other.blocks[3].mlp.fc1.bias[0] += 1e-3
    found |= {kept(net, tmp_path, **changes).digest(methods[0], seed) for net, seed, changes in (
        (other, 0, {}), (fashion, 1, {}), (fashion, 0, dict(guidance=2.0)))}
    assert len(found) == len(methods) + 3


def test_batches_are_made_in_turn_and_timed(fashion, tmp_path):
    one, two = FEW, Method("three steps", "few", 3)
    mine, done = kept(fashion, tmp_path, run="mine"), []
    mine.make([one, two], [0, 1], done.append)
    assert done == [2, 4, 5, 6, 8, 10, 11, 12]
    files = sorted(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    places = [path.parent.name for path in files]
    assert places[:2] == places[2:4] != places[4:6] == places[6:] and len(set(places)) == 4
    assert mine.seconds(one, 0).keys() == {0, 2} and min(mine.seconds(one, 0).values()) > 0
    for other in (kept(fashion, tmp_path, run="other"), kept(fashion, tmp_path)):
        assert not other.seconds(one, 0)
    kept(fashion, tmp_path / "untimed").make([one], [0], done.append)
    assert not kept(fashion, tmp_path / "untimed").seconds(one, 0)


def test_a_batch_that_another_makes_is_waited_for(fashion, tmp_path):
    mine = kept(fashion, tmp_path)
    place = tmp_path / mine.digest(FEW, 0)
    place.mkdir()
    done, lock = [], FileLock(place / "0.lock")
    with lock:
        thread = threading.Thread(target=mine.make, args=([FEW], [0], done.append))
        thread.start()
        while not (place / "2.safetensors").exists():
            assert thread.is_alive()
        thread.join(0.5)
        assert thread.is_alive() and done == [1] and not (place / "0.safetensors").exists()
    thread.join()  # the other has died without a file
    assert done == [1, 3] and (place / "0.safetensors").exists() and not list(place.glob("*.lock"))


def test_a_broken_file_is_named(fashion, tmp_path):
    mine = kept(fashion, tmp_path)
    list(mine.batches(FEW, 0))
    path = tmp_path / mine.digest(FEW, 0) / "0.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=str(path)):
        next(mine.batches(FEW, 0))

"""`train_learning_to_cache` against the same training once more, in float64, after the paper's published code."""

import csv

import numpy as np
import pytest
import torch

import harmonica_kernels as hk
from harmonica_dit import load
from harmonica_dit.methods import fora
from harmonica_dit.published_routers import load_published_router
from harmonica_dit.router import Router
from harmonica_dit.sample import image_noise, make_scheduler, sample
from harmonica_dit.sample.trajectory import Guided
from harmonica_dit.train import train_learning_to_cache
from support.blending_dit import BlendingDiT

T, K, N, BATCH, SEED, BETA = 6, 4, 7, 3, 2, 2e-3
IMAGES = torch.rand(N, 2, 8, 8, generator=torch.Generator().manual_seed(9)).double() * 2 - 1
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2])


def train(net, images=IMAGES, labels=LABELS, **options):
    settings = dict(steps=T, beta=BETA, iterations=25, batch=BATCH, lr=0.3, seed=SEED, progress=False)
    return train_learning_to_cache(net, images, labels, **settings | options)


def oracle(plain, iterations, lr):
    """Logits [T, K], losses and errors of a training, and which labels were hidden; noise channels come first."""
    dit, ones = BlendingDiT(plain, T, 0.1, 1.0, 2), torch.ones(K)
    logits = torch.randn(T, K, generator=torch.Generator().manual_seed(SEED)).double().clamp(-5, 5).requires_grad_()
    first, second, counts = torch.zeros(T, K), torch.zeros(T, K), [0] * T
    losses, errors, hidden = [], [], 0
    for n in range(iterations):
        rng = np.random.default_rng((SEED, n, 5))
        s = 2 * rng.integers(T // 2)
        order = np.random.default_rng((SEED, n // (N // BATCH), 6)).permutation(N)
        chosen = order[n % (N // BATCH) * BATCH :][:BATCH]
        drop = torch.from_numpy(rng.random(BATCH) < 0.1)
        y, hidden = torch.where(drop, 4, LABELS[chosen]), hidden + int(drop.sum())
        noise = torch.stack([torch.from_numpy(np.random.default_rng((SEED, 2**32 + n * BATCH + i)).standard_normal(
            (2, 8, 8), np.float32)) for i in range(BATCH)]).double()
        x = dit.abar[s] ** 0.5 * IMAGES[chosen] + (1 - dit.abar[s]) ** 0.5 * noise
        output, stored = dit.transformer(x, y, s, ones, torch.zeros(K), [[]] * K)
        x = dit.advance(x, s, output)
        r = logits[s + 1].sigmoid()
        with_full, _ = dit.transformer(x, y, s + 1, ones, torch.zeros(K), [[]] * K)
        blended, _ = dit.transformer(x, y, s + 1, r, torch.zeros(K), stored)
        error = (blended - with_full).square().mean()
        loss = error + BETA * r.sum()
        losses.append(loss.item())
        errors.append(error.item())
        g = torch.autograd.grad(loss, logits)[0][s + 1]
        counts[s + 1] += 1
        m = first[s + 1] = 0.9 * first[s + 1] + 0.1 * g
        v = second[s + 1] = 0.999 * second[s + 1] + 0.001 * g**2
        change = m / (1 - 0.9 ** counts[s + 1]) / ((v / (1 - 0.999 ** counts[s + 1])) ** 0.5 + 1e-8)
        logits.data[s + 1] = (logits.data[s + 1] - lr * change).clamp(-5, 5)
    assert min(counts[1::2]) > 2 and sum(counts[::2]) == 0
    return logits.detach(), losses, errors, hidden


@pytest.mark.parametrize("lr", [0.3, 2.0])  # 2.0 takes logits to ±5
def test_a_training_is_the_published_one(nets, tmp_path, lr):
    net, plain = nets
    router = train(net, lr=lr, out=tmp_path)
    logits, losses, errors, hidden = oracle(plain, 25, lr)
    assert hidden > 2 and ((logits[1::2].abs() == 5).any() == (lr == 2.0))
    found = torch.stack([row.detach() for row in router.logits]).double()
    torch.testing.assert_close(found[::2], logits[1::2], rtol=0, atol=1e-3 * lr)
    with open(tmp_path / "log.csv") as file:
        log = list(csv.DictReader(file))
    for name, expected in (("loss", losses), ("error", errors)):
        torch.testing.assert_close(torch.tensor([float(line[name]) for line in log]), torch.tensor(expected),
                                   rtol=2e-4, atol=0)


def test_only_every_second_row_is_learned_and_the_others_compute(nets):
    router = train(nets[0])
    start = torch.randn(T, K, generator=torch.Generator().manual_seed(SEED))
    assert ((torch.stack(list(router.logits))[::2] - start[1::2]).abs() > 0.1).all()
    schedule = router.schedule(0.999)
    assert schedule.compute[::2].all() and not schedule.compute[1::2].any()
    assert schedule.speedup == pytest.approx(fora(nets[0], T, 2).speedup)
    assert sample(nets[0].float(), [0, 3], schedule=router.schedule()).isfinite().all()
    nets[0].double()


def test_what_is_trained_here_is_what_the_import_reads(nets, tmp_path):
    """Its rows in the published format, noisiest last, and what that code trains nothing of: the same schedule."""
    router = train(nets[0])
    rows = torch.stack([torch.zeros(K), *(row.detach() for row in router.logits)])
    rows[::2] = -3.0  # which is not looked at
    torch.save({"routers": {f"{i}.prob": row.clone() for i, row in enumerate(rows.flip(0))}}, tmp_path / "router.pt")
    read = load_published_router(tmp_path / "router.pt", net=nets[0])
    assert torch.equal(read.schedule().compute, router.schedule().compute)
    assert read.timesteps == router.timesteps and read.guidance == router.guidance


def test_a_larger_beta_reuses_more(nets):
    cur = [train(nets[0], beta=beta, iterations=40, lr=0.5, threshold=0.5).schedule().cur for beta in (1e-5, 1.0)]
    assert cur[0] < 0.1 and cur[1] > 0.3


def test_a_target_chooses_the_threshold(nets):
    f = fora(nets[0], T, 2)
    assert train(nets[0], target_cur=0.25).schedule().cur == pytest.approx(0.25)
    assert train(nets[0], target_speedup=f.speedup).schedule().speedup == pytest.approx(f.speedup)
    for name, most in (("target_speedup", f.speedup), ("target_cur", 0.5)):
        with pytest.raises(ValueError, match=f"{name}: got .*, expected at most {most:.4g}, where every second step"):
            train(nets[0], **{name: most * 1.01})


def test_an_interrupted_training_goes_on_with_the_same_bits(nets, tmp_path, monkeypatch):
    whole = train(nets[0])
    from harmonica_dit.train import learning_to_cache

    real, calls = learning_to_cache._train_pair, []

    def interrupt(*arguments):
        calls.append(None)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(learning_to_cache, "_train_pair", interrupt)
    with pytest.raises(KeyboardInterrupt, match="stopped after 11 of 25 iterations; the same call goes on"):
        train(nets[0], out=tmp_path)
    with pytest.raises(ValueError, match="is of a training with images="):
        train(nets[0], images=IMAGES + 0.01, out=tmp_path)
    with pytest.raises(ValueError, match="is of a training with labels="):
        train(nets[0], labels=LABELS.flip(0), out=tmp_path)
    resumed = train(nets[0], out=tmp_path)
    assert len(calls) == 12 + 14
    for a, b, c in zip(whole.logits, resumed.logits, Router.load(tmp_path / "router.safetensors").logits):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("arguments, message", [
    (dict(steps=5), "steps: got 5, expected an even number"),
    (dict(beta=-1.0), "beta: got -1.0"),
    (dict(lr=0), "lr: got 0"),
    (dict(threshold=2), "threshold: got 2"),
    (dict(batch=8), "batch: got 8, expected at most the 7 images"),
    (dict(iterations=0), "iterations: got 0"),
    (dict(labels=LABELS[:3]), "labels: got 3, expected one for each of the 7 images"),
    (dict(labels=LABELS + 1), "labels: got 1 to 4, expected 0 to 3"),
    (dict(target_speedup=1.2, target_cur=0.2), "target_speedup, target_cur: give at most one")])
def test_wrong_arguments_are_refused_by_name(nets, arguments, message):
    with pytest.raises(ValueError, match=message):
        train(nets[0], **arguments)


@pytest.mark.parametrize("images", [IMAGES[:, :1], (IMAGES * 127).byte(), IMAGES.numpy()])
def test_other_images_are_refused(nets, images):
    with pytest.raises(TypeError, match=r"images: got .*, expected floating-point images \[N, 2, 8, 8\]"):
        train(nets[0], images=images)


def test_the_last_pairs_loss_says_little():
    """Its output moves the image by a hundredth of itself, and its error with half cached is far above all others'."""
    net, labels = load("fashion-dit"), torch.arange(4)
    images = sample(net, labels, steps=7, scheduler="DPMSolverMultistepScheduler", guidance=1.0, batch=4)
    noise, scheduler = image_noise(0, 0, 4, net.sample_shape), make_scheduler("ddim", 20)
    model, half, t, errors = Guided(net, 1.0, 1), (True, False) * (len(net.branches) // 2), scheduler.timesteps, []
    with torch.no_grad():
        for s in range(0, 20, 2):
            x, cache = scheduler.add_noise(images, noise, t[s : s + 1]), hk.FeatureCache()
            x = scheduler.step(model(x, t[s], labels, cache=cache), t[s], x).prev_sample
            target = model(x, t[s + 1], labels)
            errors.append((model(x, t[s + 1], labels, row=half, cache=cache) - target).square().mean().item())
    assert errors[-1] > 20 * max(errors[:-1])
    assert abs(scheduler.updates()[-1, 1]) < 0.011

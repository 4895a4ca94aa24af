"""Methods with a model of their own, a quantized or pruned copy, in a comparison."""

import pickle
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

import harmonica_dit
from harmonica_dit.evaluate import Method, compare
from harmonica_dit.evaluate.along import errors_along
from harmonica_dit.evaluate.named_methods import with_net
from harmonica_dit.evaluate.samples import Samples
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.models import DiT, quantize
from harmonica_dit.sample import sample
from harmonica_dit.train import prune
from support.many_pipes import PIPES


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_classes=4,
              learn_sigma=False, name="tiny").eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.1)
    return net


def test_each_method_samples_with_its_own_model(net, tmp_path):
    pytest.importorskip("torchao")
    narrow, small = prune(net, 1.5, timesteps=2), quantize(net, "int8")
    methods = [with_net("pruned", "pruning", 4, net, narrow), Method("FORA", "FORA", 4, fora(net, 4, 2)),
               with_net("pruned, FORA", "pruning", 4, net, narrow, fora(narrow, 4, 2)),
               with_net("int8", "int8", 4, net, small),
               with_net("int8, FORA", "int8", 4, net, small, fora(small, 4, 2))]
    rows = {row["name"]: row for row in compare(net, methods, [0, 3], steps=4, folder=tmp_path)}
    kept = Samples(net, torch.tensor([0, 3]), tmp_path, guidance=1.5)
    for method in methods:
        wanted = sample(method.model(net), [0, 3], steps=4, schedule=method.schedule, scheduler="ddim", guidance=1.5)
        assert torch.equal(kept.read(method, 0, 0)[0], wanted)
        assert not torch.equal(wanted, sample(net, [0, 3], steps=4, scheduler="ddim", guidance=1.5))
    for method in pickle.loads(ForkingPickler.dumps(methods)):  # as another process gets them
        assert torch.equal(sample(method.model(net), [0, 3], steps=4, schedule=method.schedule, scheduler="ddim",
                                  guidance=1.5), kept.read(method, 0, 0)[0])
    other = with_net("int8-dynamic", "int8", 4, net, quantize(net, "int8-dynamic"))  # has the same weights and scales
    assert len({kept.digest(method, 0) for method in (*methods, other)}) == 6
    assert kept.digest(other, 0) == kept.digest(with_net("", "", 4, net, quantize(net, "int8-dynamic")), 0)
    times = count_flops(net).total / count_flops(narrow).total
    speedups = {name: row["flops_speedup"] for name, row in rows.items()}
    assert speedups["pruned"] == times >= 1.5 and speedups["int8"] == 1 and speedups["int8, FORA"] == speedups["FORA"]
    assert speedups["pruned, FORA"] == pytest.approx(times * fora(narrow, 4, 2).speedup)
    along = errors_along(net, methods, [0, 3], steps=4)
    assert along["pruned"][0] > along["int8"][0] > along["FORA"][0] == 0  # which computes its first step


def test_a_pipeline_that_its_own_loop_runs_is_compared(monkeypatch):
    """Latents are tokens here (FLUX), and images are what the pipeline decodes."""
    net = harmonica_dit.load(PIPES["flux"].pipe(), **PIPES["flux"].to_train_on())
    methods = [Method("trunk", "trunk", 4, trunk_forecast(net, 4, every=2)), Method("2 steps", "fewer steps", 2)]
    options = dict(steps=4, scheduler=None, guidance=net.guidance)
    rows = compare(net, methods, [0, 1], **options)
    assert [row["latent_error"] > 0 for row in rows] == [False, True, True] and "error" not in rows[0]
    monkeypatch.setattr(type(net), "decodes", True)
    monkeypatch.setattr(net, "decode", lambda latents: latents.unflatten(1, (3, -1)).tanh(), raising=False)
    rows = compare(net, methods, [0, 1], **options)
    assert all(0 < row["error"] < row["latent_error"] for row in rows[1:])
    monkeypatch.setattr(net, "decode", lambda latents: latents[:, None, None])
    with pytest.raises(ValueError, match=r"net: FluxTransformer2DModel makes videos, \(1, 1"):
        compare(net, methods, [0, 1], **options)

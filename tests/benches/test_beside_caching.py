"""What stands beside caching, on a tiny model with images made up for it."""

import pytest
import torch

from bench import beside_caching
from harmonica_dit.methods import fora
from harmonica_dit.models import DiT
from harmonica_dit.sample import sample


@pytest.mark.filterwarnings("ignore:target_speedup")  # so few entries
def test_the_methods_are_what_their_names_say(tmp_path):
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    net = DiT(input_size=8, patch_size=2, in_channels=1, hidden_size=32, depth=4, num_heads=2, num_classes=4,
              learn_sigma=False, name="tiny").eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.1)
    images, labels = torch.rand(64, 1, 8, 8), torch.arange(64) % 4
    made = {m.name: m for m in beside_caching.methods(net, images, labels, 10, 1, tmp_path, fora(net, 20, 4))}
    for speedup in beside_caching.SPEEDUPS:
        for name in ("Learning-to-Cache", "FORA"):
            assert speedup <= made[f"{name}, {speedup}×"].speedup(20) < speedup + 0.3
    assert made["FORA n=2"].schedule.compute.equal(fora(net, 20, 2).compute)
    pruned = made["pruned, 0 iterations"].speedup(20)
    assert 1.5 <= pruned < 1.6 < made["pruned, 1 iterations, FORA n=2 + forecast"].speedup(20)
    assert made["int8, HarmoniCa"].schedule is made["HarmoniCa"].schedule and made["int8, HarmoniCa"].net is not None
    [alone] = [m for name, m in made.items() if name.startswith("int8 (0.")]
    assert alone.speedup(20) == 1 and alone.schedule is None
    for method in made.values():
        if method.net is not None and method.schedule is not None:
            assert sample(method.net, [0], schedule=method.schedule).isfinite().all()

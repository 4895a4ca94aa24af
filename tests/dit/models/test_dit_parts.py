"""What is put on the DiT's parts (LoRA, hooks, quantization, other modules) is followed with every cache and row."""

import copy
import pickle
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

import harmonica_kernels as hk
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.models import DiT, plain_modules
from harmonica_dit.models.dit import Attention
from harmonica_dit.sample import Trajectory, denoise, sample
from support import lora
from support.plain_dit import Mlp, PlainDiT
from support.tolerance import assert_close

SMALL = dict(input_size=8, patch_size=2, in_channels=2, hidden_size=24, depth=3, num_heads=3, num_classes=5)
K, TIMES = 6, (950, 700, 500, 300, 100, 20)
ALL, SOME = (True,) * K, (True, False, False, True, False, True)
ROWS = (None, ALL, SOME, (False,) * K, tuple(not compute for compute in SOME), ALL)
LAYERS = r".*\.(qkv|fc1|fc2|adaLN_modulation\.1)|.*attn\.proj|t_embedder\.mlp\.0"


def pair():
    """A plain DiT with random weights and the DiT that loaded its state dict, in float64: rounding counts for nothing.
    """
    plain = PlainDiT(**SMALL).eval().requires_grad_(False)
    for p in plain.parameters():
        p.normal_(std=0.2)
    net = DiT(**SMALL).eval().requires_grad_(False)
    net.load_state_dict(plain.state_dict())
    return plain.double(), net.double()


def steps(dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return [(torch.randn(4, 2, 8, 8, generator=generator).to(dtype), torch.full((4,), t), torch.arange(4) % 6)
            for t in TIMES]


class Hooked:
    """Computes everything and puts, by hooks on the branches, what a row asks for in place of their outputs."""

    def __init__(self, model):
        self.model, self.kept = model, [None] * K

    def __call__(self, step, row):
        def hook(k):
            def put(module, args, output):
                if row is None or row[k]:
                    self.kept[k] = output.clone()
                return self.kept[k]
            return put

        parts = [part for block in self.model.blocks for part in (block.attn, block.mlp)]
        handles = [part.register_forward_hook(hook(k)) for k, part in enumerate(parts)]
        try:
            return self.model(*step)
        finally:
            for handle in handles:
                handle.remove()


def check(net, oracle, change=lambda s, model: None, hoisted=False):
    """A trajectory with a cache, and the oracle's. change(s, model): what is done to each model before step s.

    A last forward has no cache. Returns the outputs.
    """
    cache, follow, outputs, dtype = hk.FeatureCache(), Hooked(oracle), [], net.pos_embed.dtype
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    with torch.no_grad():
        for s, (step, row) in enumerate(zip(steps(dtype), ROWS, strict=True)):
            for model in (net, oracle):
                change(s, model)
            if s == 0:
                ahead = net.hoist(torch.tensor(TIMES), step[2], ROWS) if hoisted else iter([{}] * len(ROWS))
            outputs.append(net(*step, row=row, cache=cache, **next(ahead)))
            assert_close(outputs[-1], follow(step, row), tolerance)
        assert_close(net(*step), oracle(*step), tolerance)
    return torch.stack(outputs)


def at(changes):
    return lambda s, model: changes.get(s, lambda model: None)(model)


LORAS = {"before": {}, "scale": {1: lambda m: lora.set_scale(m, 0.3), 3: lambda m: lora.set_scale(m, -1.0)},
         "disabled": {1: lambda m: lora.enable(m, False), 4: lambda m: lora.enable(m, True)},
         "merged": {1: lora.merge, 4: lora.unmerge}}


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize("changes", LORAS.values(), ids=LORAS)
def test_lora(changes, hoisted):
    """Its scale is changed, it is disabled, merged and taken apart between two steps."""
    plain, net = pair()
    before = check(net, plain, hoisted=hoisted)
    for model in (plain, net):
        lora.inject(model, LAYERS)
    after = check(net, plain, at(changes), hoisted)
    assert (after - before).abs().max() > 0.1 * before.abs().max()


def test_lora_that_comes_between_two_steps():
    plain, net = pair()
    check(net, plain, at({2: lambda model: lora.inject(model, LAYERS)}))


@pytest.mark.parametrize("hoisted", [False, True])
def test_a_peft_model(hoisted):
    """Called and sampled like the model in it; what `merge_and_unload` leaves writes into the cache itself again."""
    plain, net = (lora.wrap(model, LAYERS) for model in pair())
    check(net, plain, hoisted=hoisted)
    with plain.disable_adapter(), net.disable_adapter():
        check(net, plain, hoisted=hoisted)
    plain, net = plain.merge_and_unload(), net.merge_and_unload()
    check(net, plain, hoisted=hoisted)
    assert type(net) is DiT and plain_modules.is_plain_linear(net.blocks[0].mlp.fc2)


def shifted(module, args, output):
    return output + 0.5


HOOKED = ("attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.fc2", "adaLN_modulation", "adaLN_modulation.0",
          "adaLN_modulation.1")


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize("name", [*(f"blocks.1.{part}" for part in HOOKED), "final_layer.adaLN_modulation",
                                  "final_layer.adaLN_modulation.0", "final_layer.adaLN_modulation.1",
                                  "t_embedder.mlp.2", "y_embedder"])
def test_hooks(name, hoisted):
    """The hook that adds to the output is put on before the trajectory, and taken off in it."""
    plain, net = pair()
    handles = [model.get_submodule(name).register_forward_hook(shifted) for model in (plain, net)]
    check(net, plain, at({4: lambda model: handles[model is net].remove()}), hoisted)


def new_mlp(seed):
    """A feed-forward of somebody else's: its forward takes h alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        mlp = Mlp(24, 48)
    for p in mlp.parameters():
        p.data.mul_(3)
    return mlp.double().eval().requires_grad_(False)


SWAPS = {"mlp": lambda model: setattr(model.blocks[0], "mlp", new_mlp(1)),
         "attn": lambda model: setattr(model.blocks[2], "attn", nn.Sequential(new_mlp(2), nn.Tanh())),
         "block": lambda model: model.blocks.__setitem__(1, copy.deepcopy(model.blocks[2])),
         "blocks": lambda model: setattr(model, "blocks", nn.ModuleList(list(model.blocks)[::-1])),
         "adaLN": lambda model: setattr(model.blocks[1], "adaLN_modulation",
                                        nn.Sequential(nn.Tanh(), model.blocks[1].adaLN_modulation[1])),
         "linear": lambda model: setattr(model.blocks[1].mlp, "fc2", new_mlp(3).fc2)
         or setattr(model.blocks[1].mlp, "fc1", new_mlp(3).fc1)}


@pytest.mark.parametrize("step", [0, 3, 4])
@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_modules_that_are_swapped(swap, step):
    """Before a trajectory or in it, where the row reuses everything or computes some."""
    plain, net = pair()
    check(net, plain, at({step: swap}))
    check(net, plain, hoisted=True)


def test_a_replaced_forward_or_class():
    plain, net = pair()
    for model in (plain, net):
        mlp = model.blocks[0].mlp
        mlp.forward = lambda h, context=None, own=mlp.forward: 2 * own(h)
    attn = net.blocks[1].attn
    attn.__class__ = type("Doubled", (type(attn),), dict(forward=lambda self, h: 2 * Attention.forward(self, h)))
    plain.blocks[1].attn.register_forward_hook(lambda module, args, output: 2 * output)
    check(net, plain)


def test_another_number_of_blocks():
    plain, net = pair()
    for model in (plain, net):
        model.blocks = model.blocks[:2]
    assert net.branch_names[-1] == "blocks.1.mlp" and len(net.branches) == 4
    step = steps()[0]
    assert_close(net(*step, cache=hk.FeatureCache()), plain(*step))
    third = copy.deepcopy(net.blocks[0])
    for change in (lambda: net.blocks.append(third), lambda: net.blocks.__delitem__(slice(1, 3))):
        change()
        with pytest.raises(ValueError, match="blocks: the list has . now, but had 2 when it was set"):
            net(*step)


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
@pytest.mark.parametrize("hoisted", [False, True])
def test_quantized_by_torchao(config, hoisted):
    torchao = pytest.importorskip("torchao.quantization")
    net = pair()[1].float()
    exact = check(net, copy.deepcopy(net))
    torchao.quantize_(net, getattr(torchao, config)())
    assert not plain_modules.is_plain_linear(net.blocks[0].adaLN_modulation[1])
    found = check(net, copy.deepcopy(net), hoisted=hoisted)
    assert 1e-4 < (found - exact).norm() / exact.norm() < 0.3


@pytest.mark.filterwarnings("ignore:TorchaoLoraLinear was instantiated:UserWarning")
def test_lora_on_quantized_layers():
    torchao = pytest.importorskip("torchao.quantization")
    net = pair()[1].float()
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    lora.inject(net, LAYERS)
    check(net, copy.deepcopy(net), at({2: lambda model: lora.set_scale(model, 0.3)}), hoisted=True)


def test_quantized_layers_whose_weight_is_no_tensor():
    """The embedded timestep gets its dtype from what is left of parameters."""

    class Quantized(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear = [linear]

        def weight(self):
            return self.linear[0].weight

        def forward(self, h):
            return self.linear[0](h)

    plain, net = pair()
    for name in ("t_embedder.mlp.0", "blocks.0.mlp.fc1", "blocks.1.adaLN_modulation.1"):
        net.set_submodule(name, Quantized(net.get_submodule(name)))
    check(net, plain)


def test_bodies_without_bias():
    plain, net = pair()
    for model in (plain, net):
        for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            model.blocks[1].get_submodule(name).bias = None
    check(net, plain)


def test_only_plain_layers_write_into_the_cache(monkeypatch):
    _, net = pair()
    writes, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, out: writes.append(1) or addmm(*args, out=out))
    step = steps()[0]

    def count():
        writes.clear()
        with torch.no_grad():
            net(*step, cache=hk.FeatureCache())
        return len(writes)

    assert count() == K
    net.blocks[0].attn.proj.register_forward_hook(shifted)
    assert count() == K - 1
    lora.inject(net, r"blocks\.1\.mlp\.fc2")
    assert count() == K - 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_run_their_own_modules(copied):
    plain, net = pair()
    other = copied(net)
    for model in (net.blocks[0].attn.proj, net.blocks[2].adaLN_modulation[1]):
        model.weight.zero_()
    check(other, plain)


def test_compiled_in_one_graph():
    """What has been put on a layer is decided while the graph is traced."""
    torch._dynamo.reset()
    plain, net = pair()
    for model in (plain, net):
        model.blocks = model.blocks[:1]
        lora.inject(model, r".*attn\.proj")
    compiled, step = torch.compile(net, fullgraph=True, backend="aot_eager"), steps()[0]
    with torch.no_grad():
        assert_close(compiled(*step, cache=hk.FeatureCache()), plain(*step))


@torch.no_grad()
@pytest.mark.parametrize("put_on", [lambda net: lora.inject(net, LAYERS), lambda net: SWAPS["adaLN"](net)],
                         ids=["lora", "swap"])
def test_a_gated_trajectory(put_on):
    """Its table of modulation rows, and bodies that write."""
    torch.manual_seed(0)  # some random models make much of a rounding
    net = DiT(**SMALL, learn_sigma=False).eval().requires_grad_(False)
    net.guidance_channels = 2
    net.load_state_dict({name: 0.2 * torch.randn(p.shape) for name, p in net.state_dict().items()})
    put_on(net)
    trajectory, noise = partial(Trajectory, net, torch.tensor([0, 3]), steps=3), torch.randn(2, 2, 8, 8)
    x = trajectory().start(noise)
    for s in range(3):
        x = trajectory().step(x, s)
    for executor in (denoise, hk.compile(denoise, mode="gated")):
        assert_close(executor(trajectory(), noise), x, 1e-4)


@pytest.mark.parametrize("make", [lambda net: fora(net, 6, 2, order=1), lambda net: trunk_forecast(net, 6, every=2),
                                  lambda net: replace(fora(net, 6, 3), runs=(2, 3, 1))], ids=["branch", "trunk", "run"])
def test_schedules_of_every_unit(make):
    """A LoRA beside the weights samples what one merged into them does."""
    net = DiT(**SMALL).eval().requires_grad_(False)
    for p in net.parameters():
        p.normal_(std=0.1)
    merged = lora.wrap(copy.deepcopy(net), LAYERS).merge_and_unload()
    lora.inject(net, LAYERS)
    schedule, labels = make(net), torch.tensor([0, 3])
    assert_close(sample(net, labels, schedule=schedule), sample(merged, labels, schedule=schedule), 1e-3)

"""LoRA by peft, hooks and other modules on diffusers' DiT and PixArt: followed by the fused adapters at every step."""

import copy

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from torch import nn

from harmonica_dit.pipelines.adapters import adapt
from support import lora
from support.hook_oracle import Oracle
from support.pipes import small_pixart
from support.tolerance import assert_close

TIMES = (950, 700, 500, 300, 100)
EVERYWHERE = (r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|norm1\.linear|timestep_embedder\.linear_1)"
              r"|proj_out(_1)?|adaln_single\.linear|caption_projection\.linear_1|pos_embed\.proj")


@pytest.fixture
def exact(small):
    """A small model in float64, so that rounding counts for nothing, and the inputs of a forward."""
    model, inputs = small
    return model.double(), {name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point()
                            else value for name, value in inputs.items()}


def at(changes):
    return lambda s, model: changes.get(s, lambda model: None)(model)


def check(adapter, inputs, change=lambda s, model: None, hoisted=False, oracle=None):
    """A trajectory of the adapter against the transformer with hooks. change(s, model): what is done before step s.

    oracle: another module than a copy of the adapter's transformer.
    """
    transformer, names = adapter.transformer, adapter.branch_names
    oracle = copy.deepcopy(transformer) if oracle is None else oracle
    some = tuple(k % 3 != 1 for k in range(len(names)))
    rows = ((True,) * len(names), some, (False,) * len(names), tuple(not compute for compute in some), some)
    cache, follow = adapter.new_cache(), Oracle(oracle, names)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for s, (t, row) in enumerate(zip(TIMES, rows, strict=True)):
            for model in (transformer, oracle):
                change(s, model)
            x = torch.randn(inputs["hidden_states"].shape, generator=generator, dtype=torch.float64)
            now = inputs | dict(hidden_states=x, timestep=torch.full_like(inputs["timestep"], t))
            if s == 0:
                ahead = list(adapter.hoist(rows, TIMES, **now)) if hoisted else [{}] * len(rows)
            got = adapter(**now, row=row, cache=cache, **ahead[s]).sample
            expected = follow(now, lambda k, fresh, kept, row=row: (fresh, True) if row[k] else (kept[-1], False))
            assert_close(got.flatten(), expected, 1e-9)
        assert_close(adapter(**now).sample, oracle(**now).sample, 1e-9)
        assert_close(adapter(**now, cache=adapter.new_cache()).sample, oracle(**now).sample, 1e-9)


LORAS = {"as it is": {}, "scale": {1: lambda m: lora.set_scale(m, 0.3), 3: lambda m: lora.set_scale(m, -1.0)},
         "disabled": {1: lambda m: lora.enable(m, False), 3: lambda m: lora.enable(m, True)},
         "merged": {1: lora.merge, 3: lora.unmerge}}


@pytest.mark.parametrize("hoisted", [False, True])
@pytest.mark.parametrize("changes", LORAS.values(), ids=LORAS)
def test_lora(exact, changes, hoisted):
    """Injected before and after `adapt`; its scale is changed, it is disabled, merged and taken apart between steps."""
    model, inputs = exact
    early = adapt(model)
    check(early, inputs, hoisted=hoisted)
    lora.inject(model, EVERYWHERE)
    assert len(lora.layers(model)) > 15
    for adapter in (early, adapt(model)):
        check(adapter, inputs, at(changes), hoisted)


def test_lora_that_comes_between_two_steps(exact):
    model, inputs = exact
    check(adapt(model), inputs, at({2: lambda model: lora.inject(model, EVERYWHERE)}))


@pytest.mark.parametrize("hoisted", [False, True])
def test_a_peft_model(exact, hoisted):
    """Its LoRA runs; disabled it does not; and after `merge_and_unload` the same adapter goes on."""
    model, inputs = exact
    plain = copy.deepcopy(model)
    wrapped = lora.wrap(model, EVERYWHERE)
    adapter = adapt(wrapped)
    assert adapter.transformer is model and type(adapter) is type(adapt(plain))
    check(adapter, inputs, hoisted=hoisted)
    with torch.no_grad():
        with wrapped.disable_adapter():
            assert_close(adapter(**inputs, cache=adapter.new_cache()).sample, plain(**inputs).sample, 1e-9)
        expected = wrapped(**inputs).sample
        assert_close(adapter(**inputs, cache=adapter.new_cache()).sample, expected, 1e-9)
        assert wrapped.merge_and_unload() is model and not lora.layers(model)
        assert_close(adapter(**inputs, cache=adapter.new_cache()).sample, expected, 1e-9)
    check(adapter, inputs, hoisted=hoisted)


def test_what_is_put_on_the_peft_model_itself_is_refused(small):
    inside = lora.wrap(torch.compile(copy.deepcopy(small[0]), backend="eager"), r".*attn1\.to_q")
    wrapped = lora.wrap(small[0], EVERYWHERE)
    for compiled in (torch.compile(wrapped, backend="eager"), inside):
        with pytest.raises(ValueError, match="transformer: has been compiled as a whole"):
            adapt(compiled)
    wrapped.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"the PeftModel around it has hooks .*transformer\.get_base_model\(\)"):
        adapt(wrapped)


@pytest.mark.parametrize("target, left", [("transformer_blocks.1.attn2.to_k", (0, 2)),
                                          ("transformer_blocks.2.attn2.to_v", (0, 1)),
                                          ("caption_projection.linear_2", None)])
@torch.no_grad()
def test_what_of_the_text_a_lora_may_change_is_left_for_the_steps(target, left):
    """Its scale is followed from step to step. left: the blocks whose keys and values are hoisted all the same."""
    model = small_pixart(num_layers=3).double()
    adapter, blocks = adapt(model), model.transformer_blocks
    inputs = dict(hidden_states=torch.randn(2, 4, 8, 8).double(), timestep=torch.tensor([5, 5]),
                  encoder_hidden_states=torch.randn(2, 9, 20).double())
    lora.inject(model, target.replace(".", r"\."))
    first = next(adapter.hoist(((True,) * len(adapter.branches),), (5,), **inputs))
    assert set(first.get("keys_values", ())) == {blocks[i].attn2 for i in left or ()}
    assert ("text" in first) == (left is not None)
    check(adapter, inputs, at(LORAS["scale"]), hoisted=True)


def new_feed_forward(dropout=0.0):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        made = FeedForward(24, mult=2, activation_fn="gelu", dropout=dropout)
    return made.double().eval().requires_grad_(False)


def new_attention(**options):
    with torch.random.fork_rng():
        torch.manual_seed(2)
        made = Attention(24, heads=2, dim_head=6, bias=True, **options)
    return made.double().eval().requires_grad_(False)


SWAPS = {"ff": lambda model: setattr(model.transformer_blocks[0], "ff", new_feed_forward()),
         "attn": lambda model: setattr(model.transformer_blocks[1], "attn1", new_attention()),
         "another attention": lambda model: setattr(model.transformer_blocks[1], "attn1", new_attention(
             residual_connection=True, rescale_output_factor=2.0, qk_norm="layer_norm", norm_num_groups=4)),
         "block": lambda model: model.transformer_blocks.__setitem__(0, copy.deepcopy(model.transformer_blocks[1]))}


@pytest.mark.parametrize("step", [0, 2, 3])
@pytest.mark.parametrize("swap", SWAPS.values(), ids=SWAPS)
def test_modules_that_are_swapped(exact, swap, step):
    """Before a trajectory or in it, where the row reuses everything or computes some."""
    model, inputs = exact
    adapter = adapt(model)
    check(adapter, inputs, at({step: swap}))
    check(adapter, inputs, hoisted=True)
    adapter.check()


def test_swaps_that_the_adapter_cannot_follow_are_refused(small):
    model, inputs = small
    adapter, block = adapt(model), model.transformer_blocks[1]
    own = block.norm1
    block.norm1 = nn.RMSNorm(24)
    for again in (adapter.check, lambda: adapt(model)):
        with pytest.raises(ValueError, match=r"transformer_blocks\.1\.norm1: has another class \(RMSNorm\)"):
            again()
    block.norm1 = own
    norm = own.norm if hasattr(own, "norm") else own
    norm.eps, eps = 0.5, norm.eps
    with pytest.raises(ValueError, match="a block has other branches, or norms of another eps"):
        adapter.check()
    norm.eps = eps
    adapter.check()
    for blocks in (model.transformer_blocks[:1], nn.ModuleList(model.transformer_blocks)):
        model.transformer_blocks = blocks
        for call in (adapter.check, lambda: adapter(**inputs)):
            with pytest.raises(ValueError, match="transformer_blocks: is another list, or of another length"):
                call()
        assert len(adapt(model).branches) == len(blocks) * (len(adapter.branches) // 2)


def test_copies_run_their_own_modules(exact):
    model, inputs = exact
    adapter = adapt(model)
    other = copy.deepcopy(adapter)
    assert other.transformer is not model
    for p in model.parameters():
        p.zero_()
    check(other, inputs, hoisted=True)

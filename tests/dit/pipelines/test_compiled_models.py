"""`enable_cache` on transformers with compiled parts: what is taken, and that the advice of what is refused works."""

import pytest
import torch
from torch import nn

import harmonica_dit
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support import lora
from support.cached_calls import STEPS, every_second, every_second_of, with_cache
from support.many_pipes import PIPES
from support.pipes import names_of


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    """What is compiled is counted, and beyond a limit left as it is."""
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["flux", "wan", "ltx"])
def test_compile_repeated_blocks(name):
    """diffusers' own way, for blocks that are called with keywords and without."""
    entry = PIPES[name]
    expected = with_cache(entry, entry.pipe())
    pipe = entry.pipe()
    pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert torch.equal(with_cache(entry, pipe), expected)
    with pytest.raises(ValueError, match=r"has been compiled, .*set its ._compiled_call_impl to None and compile its "
                                         r"branches, for example [a-z_.]+\[0\]\.[a-z0-9_.]+\.compile\(\)"):
        harmonica_dit.enable_cache(pipe, every_second_of(entry.pipe().transformer))


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("compiled", [lambda block: torch.compile(block, backend="eager"), "forward"],
                         ids=["wrapped", "forward"])
def test_blocks_compiled_one_by_one(name, compiled):
    entry = PIPES[name]
    expected, pipe = with_cache(entry, entry.pipe()), entry.pipe()
    for blocks in pipe.transformer.children():
        for i, block in enumerate(blocks if isinstance(blocks, nn.ModuleList) else ()):
            if compiled == "forward":
                block.forward = torch.compile(block.forward, backend="eager", fullgraph=True)
            else:
                blocks[i] = compiled(block)
    assert torch.equal(with_cache(entry, pipe), expected)


WAYS = {"wrapped": lambda model: torch.compile(model, backend="eager"),
        "in place": lambda model: model.compile(backend="eager") or model,
        "forward": lambda model: setattr(model, "forward", torch.compile(model.forward, backend="eager")) or model}


def follow(advice: str, model):
    """Does what the message says. Returns the model then."""
    if "take its ._orig_mod" in advice:
        model = model._orig_mod
    elif "set its ._compiled_call_impl to None" in advice:
        model._compiled_call_impl = None
    else:
        assert "delete its .forward" in advice
        del model.forward
    assert ("compile_repeated_blocks" in advice) == ("its blocks" in advice and bool(model._repeated_blocks))
    example = advice.partition("for example ")[2].partition(".compile()")[0]
    part = eval(f"model.{example}", {"model": model})
    part.compile(backend="eager")
    return model, part


@pytest.mark.parametrize("name", ["flux", "pixart-sigma"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("unit", ["trunk", "branch"])
def test_the_advice_works(name, way, unit):
    """For `enable_cache` with a speedup and with a schedule of branches; and for `adapt`."""
    entry = PIPES[name]
    pipe, plain = entry.pipe(), entry.pipe()
    names = names_of(plain.transformer) if name == "pixart-sigma" else GenericAdapter(plain.transformer).branch_names
    config = 1.7 if unit == "trunk" else every_second(names)
    pipe.transformer = WAYS[way](pipe.transformer)
    with pytest.raises(ValueError, match="transformer: has been compiled as a whole") as refused:
        harmonica_dit.enable_cache(pipe, config)
    with pytest.raises(ValueError, match="transformer: has been compiled as a whole.*compile its branches") as no_adapt:
        adapt(pipe.transformer)
    pipe.transformer, part = follow(str(refused.value), pipe.transformer)
    assert part._compiled_call_impl is not None
    found, expected = with_cache(entry, pipe, config), with_cache(entry, plain, config)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    again = WAYS[way](entry.pipe().transformer)
    again, part = follow(str(no_adapt.value), again)
    assert set(adapt(again).branch_names) == set(names)


def test_a_compiled_peft_model():
    """Which passes the attributes of the transformer inside on."""
    entry, pipe = PIPES["flux"], PIPES["flux"].pipe()
    inside = lora.wrap(pipe.transformer, r".*\.(to_q|to_k)")
    pipe.transformer = torch.compile(inside, backend="eager")
    with pytest.raises(ValueError, match=r"compiled as a whole.*take its ._orig_mod and compile its blocks, for "
                                         r"example transformer_blocks\[0\]\.compile"):
        harmonica_dit.enable_cache(pipe, 1.7)
    pipe.transformer = inside
    expected = with_cache(entry, pipe)
    inside.transformer_blocks[0].compile(backend="eager")
    assert torch.equal(with_cache(entry, pipe), expected)
    harmonica_dit.enable_cache(pipe, 1.7)
    inside.compile(backend="eager")  # later, and in place
    with pytest.raises(ValueError, match="compiled as a whole.*set its ._compiled_call_impl to None"):
        entry.call(pipe, steps=STEPS)

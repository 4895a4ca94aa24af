"""The generic adapter against the plain model and an oracle made of forward hooks; the docs' table against both."""

import inspect
import re
import threading
from contextlib import contextmanager

import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter, GenericCache, flop_counter
from support.generic_models import MODELS, make, moved, state, values
from support.generic_models import row as row_of

NAMES = list(MODELS)


class Oracle:
    """Computes everything and puts, by forward hooks, what a row asks for in place of the branches' outputs.

    Keeps each branch's outputs by step, so it knows nothing of slots or of single-stream blocks' other modules.
    """

    def __init__(self, transformer, names):
        self.transformer, self.names, self.stored = transformer, names, [[] for _ in names]

    def __call__(self, arguments, decide):
        """decide(k, fresh, [previous, latest]) -> (the output to go on with, whether to store it)."""
        handles, new = [], [[] for _ in self.names]
        stores = [True] * len(self.names)

        def hook(k):
            def put(module, args, output):
                call = len(new[k])
                o, stores[k] = decide(k, output, [outputs[call] for outputs in self.stored[k][-2:]])
                new[k].append(o)
                return o
            return put

        try:
            for k, name in enumerate(self.names):
                handles.append(self.transformer.get_submodule(name).register_forward_hook(hook(k)))
            result = values(self.transformer(**arguments))
        finally:
            for handle in handles:
                handle.remove()
        for k, outputs in enumerate(new):
            if stores[k]:
                self.stored[k].append(outputs)
        return result


def over(f, *outputs):
    if isinstance(outputs[0], tuple):
        return tuple(None if parts[0] is None else f(*parts) for parts in zip(*outputs))
    return f(*outputs)


def forecast(e, previous, latest):
    return over(lambda now, before: (1 + e) * now - e * before, latest, previous)


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return make(request.param)


@torch.no_grad()
def test_computing_everything_is_the_plain_forward_to_the_bit(model):
    transformer, arguments = model
    adapter, before = adapt(transformer), state(transformer)
    assert type(adapter) is GenericAdapter and adapter.transformer is transformer
    plain = transformer(**arguments)
    K = len(adapter.branch_names)
    for row, cache in ((None, None), (None, adapter.new_cache()), ((True,) * K, adapter.new_cache(2)),
                        ((True,) * K, None)):
        output = adapter(**arguments, row=row, cache=cache)
        assert type(output) is type(plain) and torch.equal(values(output), values(plain))
    assert state(transformer) == before


@torch.no_grad()
def test_hard_rows_equal_the_oracle_and_reused_modules_do_not_run(model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    flops = adapter.trace(**arguments)
    assert not adapter.left_out and min(flops.branches) > 0
    names, K, before = adapter.branch_names, len(adapter.branch_names), state(transformer)
    cache, oracle = adapter.new_cache(2), Oracle(transformer, names)
    for s in range(5):
        row = (True,) * K if s < 2 else row_of(K, s)
        e = tuple(0.0 if compute or k % 2 else 0.3 * s for k, compute in enumerate(row)) if s > 2 else None
        step = moved(arguments, s)

        def decide(k, fresh, held, row=row, e=e):
            if row[k]:
                return fresh, True
            return (forecast(e[k], *held) if e is not None and e[k] else held[-1]), False

        expected = oracle(step, decide)
        assert torch.equal(values(adapter(**step, row=row, forecast_weights=e, cache=cache)), expected), s
    for last in (row, (False,) * K):
        reused = [transformer.get_submodule(name) for name, compute in zip(names, last) if not compute]
        reused += [transformer.get_submodule(name.replace("proj_out", "attn")) for name, compute in zip(names, last)
                   if name.endswith(".proj_out") and not compute]
        with called_inside(reused) as called, flop_counter() as counter:
            adapter(**step, row=last, cache=cache)
        assert reused and not called
        computed = sum(number for number, compute in zip(flops.branches, last) if compute)
        assert counter.get_total_flops() == flops.fixed + computed
    assert state(transformer) == before


@contextmanager
def called_inside(modules):
    """The modules inside these that are called."""
    called = []
    handles = [inner.register_forward_pre_hook(lambda inner, _: called.append(inner))
               for module in modules for inner in module.modules() if inner is not module]
    yield called
    for handle in handles:
        handle.remove()


def test_soft_rows_and_their_gradients_equal_the_oracle(model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    names, K = adapter.branch_names, len(adapter.branch_names)
    cache, oracle = adapter.new_cache(2), Oracle(transformer, names)
    noise = torch.Generator().manual_seed(0)
    for s in range(4):
        r, e = torch.rand(K, generator=noise), torch.randn(K, generator=noise)
        mine, theirs = ([row.clone().requires_grad_() for row in (r, e)] for _ in range(2))
        step = moved(arguments, s)

        def decide(k, fresh, held, s=s, r=theirs[0], e=theirs[1]):
            if s == 0:
                return fresh, True
            held = [over(torch.Tensor.detach, o) for o in held]
            old = forecast(e[k], *held) if len(held) == 2 else held[-1]
            return over(lambda f, o: r[k] * f + (1 - r[k]) * o, fresh, old), r[k].item() > 0.5

        expected = oracle(step, decide)
        soft = {} if s == 0 else dict(row=mine[0], forecast_weights=mine[1], threshold=0.5)
        result = values(adapter(**step, cache=cache, **soft))
        assert torch.equal(result, expected), s
        if s:
            for output in (result, expected):
                output.square().sum().backward()
            for ours, other in zip(mine, theirs):
                torch.testing.assert_close(*(torch.zeros(K) if row.grad is None else row.grad for row in (ours, other)))
    assert (mine[0].grad.abs() > 1e-3).any() and (mine[1].grad.abs() > 1e-3).any()


@pytest.mark.parametrize("name", ["CogVideoXTransformer3DModel", "FluxTransformer2DModel"])
def test_gradients_of_a_soft_row(name):
    transformer, arguments = make(name)
    transformer.double().requires_grad_(False)
    arguments = {name: value.double() for name, value in arguments.items()}
    adapter = GenericAdapter(transformer)
    K = len(adapter.branch_names)
    filled = adapter.new_cache(2)
    with torch.no_grad():
        for s in range(2):
            adapter(**moved64(arguments, s), cache=filled)

    def forward(r, e):
        cache = adapter.new_cache().copy_(filled)
        return values(adapter(**moved64(arguments, 2), row=r, forecast_weights=e, cache=cache))

    inputs = [torch.rand(K, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


def moved64(arguments, s):
    return {name: value.double() for name, value in moved(arguments, s).items()}


def test_flops_of_a_block_by_hand():
    transformer, arguments = make("WanTransformer3DModel")
    flops = GenericAdapter(transformer).trace(**arguments)
    N, text, D, hidden = 2 * 2 * 3, 3, 24, 32
    one = 4 * 2 * N * D * D + 2 * 2 * N * N * D
    cross = 2 * 2 * (N + text) * D * D + 2 * 2 * N * text * D
    assert flops.branches[:3] == (one, cross, 2 * 2 * N * D * hidden)
    transformer, arguments = make("FluxTransformer2DModel")
    flops = GenericAdapter(transformer).trace(**arguments)
    N, D = 6 + 3, 32
    assert flops.branches[-1] == 2 * N * D * D * (3 + 4 + 5) + 2 * 2 * N * N * D


class Half(nn.Module):
    """Halves its input; a branch with something odd about it."""

    def __init__(self, odd=None):
        super().__init__()
        self.inner, self.odd = nn.Sequential(nn.Linear(4, 4)), odd

    def forward(self, x):
        o = self.inner(x) / 2
        return {"odd": o} if self.odd == "output" else o


class Block(nn.Module):
    def __init__(self, odd=None):
        super().__init__()
        self.ff, self.attn, self.odd = Half(), Half(odd), odd

    def forward(self, x):
        if self.odd != "skipped":
            o = self.attn(x)
            x = x + (o["odd"] if self.odd == "output" else o.mul_(2) if self.odd == "in place" else o)
        if self.odd == "twice":
            x = x + self.ff(x)
        return x + self.ff(x)


class Toy(nn.Module):
    def __init__(self, *odd):
        super().__init__()
        self.blocks = nn.ModuleList(map(Block, odd))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_trace_orders_branches_and_leaves_out_what_cannot_be_reused():
    toy = Toy(None, "skipped", "in place", "output", "twice")
    toy.blocks.append(toy.blocks[0])  # one block at two places
    adapter = GenericAdapter(toy)
    assert adapter.branch_names[:2] == ("blocks.0.ff", "blocks.0.attn") and len(adapter.branch_names) == 10
    x = torch.randn(2, 4)
    adapter.trace(x)
    assert adapter.branch_names == ("blocks.0.attn", "blocks.0.ff", "blocks.1.ff", "blocks.2.ff", "blocks.3.ff",
                                    "blocks.4.attn", "blocks.4.ff")
    assert adapter.left_out == {"blocks.1.attn": "is not called",
                                "blocks.2.attn": "its output is changed in place",
                                "blocks.3.attn": "its output is not float tensors"}
    cache, oracle = adapter.new_cache(), Oracle(toy, adapter.branch_names)
    row = (False, False, True, True, False, True, False)  # blocks.0 and blocks.4.ff run twice in a forward
    for s, now in enumerate(((True,) * 7, row, row)):
        x = torch.randn(2, 4)
        expected = oracle_of(oracle, toy, x, now)
        assert torch.equal(adapter(x, row=now, cache=cache), expected), s
    with pytest.raises(TypeError, match="none of its branches can be reused"):
        GenericAdapter(Toy("skipped"), ["blocks.0.attn"]).trace(x)


def test_trace_sees_in_inference_mode_what_is_changed_in_place():
    """Also where the model and its arguments were made there; without a trace such a branch would go wrong unseen."""
    with torch.inference_mode():
        toy, x = Toy("in place", None), torch.randn(2, 4)
        adapter, plain = GenericAdapter(toy), toy(x)
        assert plain.is_inference() and toy.blocks[0].ff.inner[0].weight.is_inference()
        adapter.trace(x)
        assert adapter.left_out == {"blocks.0.attn": "its output is changed in place"}
        cache = adapter.new_cache()
        for row in (None, (False,) * 3, (False,) * 3):
            assert torch.equal(adapter(x, row=row, cache=cache), plain)


def oracle_of(oracle, toy, x, row):
    class Listed(nn.Module):  # values() takes what a diffusers model returns
        def forward(self):
            return [toy(x)]

    oracle.transformer = wrapped = Listed()
    wrapped.get_submodule = toy.get_submodule
    return oracle({}, lambda k, fresh, held: (fresh, True) if row[k] else (held[-1], False)).view_as(x)


@torch.no_grad()
@pytest.mark.parametrize("odd, error, said", [
    ("skipped", RuntimeError, "was called 0 times"), ("output", TypeError, "returned dict"),
    ("in place", RuntimeError, "its output was changed in place")])
def test_without_a_trace_such_a_branch_is_refused_when_it_shows(odd, error, said):
    toy = Toy(None, odd)
    adapter, cache, before = GenericAdapter(toy), GenericCache(), state(toy)
    x = torch.randn(2, 4)
    plain = toy(x)
    assert torch.equal(adapter(x), plain)
    with pytest.raises(error, match=f"blocks.1.attn: {said}.*trace"):
        adapter(x, cache=cache)
    assert state(toy) == before
    with pytest.raises(RuntimeError, match="did not finish.*cache.reset"):
        adapter(x, cache=cache)


@torch.no_grad()
def test_another_number_of_calls_than_was_stored_is_refused():
    toy = Toy("twice")
    adapter, x = GenericAdapter(toy), torch.randn(2, 4)
    for first, then, said in (("twice", None, "called 1 times in this forward, expected 2"),
                              (None, "twice", "more often than in the forward that stored")):
        cache, toy.blocks[0].odd = adapter.new_cache(), first
        adapter(x, cache=cache)
        toy.blocks[0].odd = then
        with pytest.raises(RuntimeError, match=f"blocks.0.ff.*{said}"):
            adapter(x, row=(False, True), cache=cache)


@torch.no_grad()
def test_arguments_are_checked_before_anything_runs():
    transformer, arguments = make("SanaTransformer2DModel")
    adapter = GenericAdapter(transformer)
    K, cache = len(adapter.branch_names), adapter.new_cache()

    def refused(error, said, arguments=arguments, **options):
        with pytest.raises(error, match=said):
            adapter(**arguments, **options)

    refused(ValueError, "row: got 2 entries", row=(True, False), cache=cache)
    refused(ValueError, "reuses branches; pass cache", row=(False,) * K)
    refused(ValueError, "holds no output of branch 0", row=(False,) * K, cache=cache)
    refused(TypeError, "cache: got int", cache=3)
    refused(ValueError, "threshold: got 2", threshold=2)
    refused(ValueError, "forecast_weights: got 1", cache=cache, forecast_weights=(1.0,))
    adapter(**arguments, cache=cache)
    held = cache.nbytes
    assert held > 0
    refused(ValueError, "last two computed outputs", row=(False,) * K, forecast_weights=(1.0,) * K, cache=cache)
    doubled = {name: torch.cat([value, value]) for name, value in arguments.items()}
    refused(ValueError, "cache: holds a forward of", doubled, row=(False,) * K, cache=cache)
    cache.reset()
    adapter(**doubled, cache=cache)
    assert cache.nbytes == 2 * held
    with pytest.raises(ValueError, match="history: got 3"):
        adapter.new_cache(3)
    with pytest.raises(TypeError, match="Sequential has no list of blocks"):
        GenericAdapter(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="has no submodule 'blocks.0.attn'"):
        GenericAdapter(transformer, ["blocks.0.attn"])
    toy = Toy(None)
    toy.blocks.append(toy.blocks[0])
    with pytest.raises(ValueError, match="two of the names are one module"):
        GenericAdapter(toy, ["blocks.0.attn", "blocks.1.attn"])


def test_compiled_blocks_and_gradient_checkpointing_are_refused():
    transformer, arguments = make("SD3Transformer2DModel")
    adapter = GenericAdapter(transformer)
    cache, K = adapter.new_cache(), len(adapter.branch_names)
    transformer.enable_gradient_checkpointing()
    adapter(**arguments, cache=cache)
    for row in (torch.rand(K), row_of(K, 0)):
        with pytest.raises(ValueError, match="disable_gradient_checkpointing"):
            adapter(**arguments, row=row, cache=cache)
    with torch.no_grad():
        adapter(**arguments, row=row_of(K, 0), cache=cache)
    transformer.transformer_blocks[1].compile()
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled"):
        adapter(**arguments, cache=adapter.new_cache())
    with pytest.raises(ValueError, match="transformer_blocks.1: has been compiled"):
        GenericAdapter(transformer)


@torch.no_grad()
def test_an_error_inside_leaves_nothing_behind_and_other_hooks_stay():
    transformer, arguments = make("AuraFlowTransformer2DModel")
    add_hook_to_module(transformer.single_transformer_blocks[0].attn, ModelHook())  # replaces its forward
    adapter, before = GenericAdapter(transformer), state(transformer)
    hooked = vars(transformer.single_transformer_blocks[0].attn)["forward"]
    plain = values(transformer(**arguments))
    cache = adapter.new_cache()
    assert torch.equal(values(adapter(**arguments, cache=cache)), plain)
    assert vars(transformer.single_transformer_blocks[0].attn)["forward"] is hooked

    def fail(*_):
        raise KeyboardInterrupt

    handle = transformer.single_transformer_blocks[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        adapter(**arguments, row=row_of(len(adapter.branch_names), 1), cache=cache)
    handle.remove()
    assert state(transformer) == before and torch.equal(values(transformer(**arguments)), plain)
    with pytest.raises(RuntimeError, match="did not finish"):
        adapter(**arguments, cache=cache)


def test_threads_share_a_transformer():
    transformer, arguments = make("LTXVideoTransformer3DModel")
    adapters = [GenericAdapter(transformer), GenericAdapter(transformer)]
    K = len(adapters[0].branch_names)
    before = state(transformer)

    @torch.no_grad()
    def walk(i):
        if i == 2:  # one that knows nothing of gates
            return [values(transformer(**moved(arguments, s))) for s in range(12)]
        cache = adapters[i].new_cache()
        return [values(adapters[i](**moved(arguments, s), row=row_of(K, 10 * i + s) if s else None, cache=cache))
                for s in range(12)]

    expected = [walk(i) for i in range(3)]
    found = [None] * 3
    threads = [threading.Thread(target=lambda i=i: found.__setitem__(i, walk(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for i in range(3) for a, b in zip(expected[i], found[i]))
    assert state(transformer) == before


def describe(names):
    """Branches' names as the docs have them: `list`: part, part; …"""
    lists = {}
    for name in names:
        blocks, part = re.split(r"\.\d+\.", name, maxsplit=1)
        lists.setdefault(blocks, {})[re.sub(r"\.\d+\.", ".*.", part)] = None
    return "; ".join(f"`{blocks}`: {', '.join(parts)}" for blocks, parts in lists.items())


@pytest.fixture(scope="module")
def docs(pytestconfig):
    """docs/models.md by headline."""
    parts = re.split(r"^## (.*)\n", (pytestconfig.rootpath / "docs" / "models.md").read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def table(text):
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))


@torch.no_grad()
def test_docs_name_the_classes_that_are_run_here(docs, model):
    transformer, arguments = model
    adapter = GenericAdapter(transformer)
    adapter.trace(**arguments)
    rows = table(docs["Generic"])
    assert rows[type(transformer).__name__] == describe(adapter.branch_names) and set(rows) == set(MODELS)


def few_layers(cls):
    """The default model of two layers, without memory."""
    counts = {name: 2 for name, parameter in inspect.signature(cls).parameters.items()
              if re.search("(layers|depth|blocks)$", name) and type(parameter.default) is int}
    with torch.device("meta"):
        return cls(**counts)


def test_docs_name_what_is_found_in_other_classes(docs):
    found, missing = table(docs["Found, not run"]), []
    for name, branches in found.items():
        cls = getattr(diffusers, name, None)  # diffusers of another version may not have it
        if cls is None:
            missing.append(name)
        else:
            assert describe(GenericAdapter(few_layers(cls)).branch_names) == branches, name
    assert len(missing) < len(found) and not set(found) & set(MODELS)


def test_docs_name_the_fused_and_the_refused(docs):
    for name, branches in table(docs["Fused"]).items():
        adapter = adapt(few_layers(getattr(diffusers, name)))
        assert type(adapter) is not GenericAdapter and describe(adapter.branch_names) == branches
    for name in table(docs["Not"]):
        if hasattr(diffusers, name):
            with pytest.raises(TypeError, match="no list of blocks"):
                GenericAdapter(few_layers(getattr(diffusers, name)))


def test_the_code_in_the_docs_runs(docs):
    transformer, arguments = make("SD3Transformer2DModel")

    def denoise(transformer, T):
        return [transformer(**moved(arguments, s) | dict(timestep=arguments["timestep"] - s)) for s in range(T)]

    names = dict(torch=torch, transformer=transformer, arguments=arguments, T=4, denoise=denoise)
    with torch.no_grad():
        plain = values(denoise(transformer, 4)[-1])
    blocks = re.findall(r"```python\n(.*?)```", docs["Generic"], re.DOTALL)
    assert len(blocks) == 2
    for code in blocks:
        exec(code, names)
    assert names["schedule"].cur == 0.5 and not torch.equal(values(names["image"][-1]), plain)
    values(names["output"]).sum().backward()
    assert names["scores"].grad is not None

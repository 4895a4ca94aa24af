"""docs/models.md names the classes, branches and trunks that are found, and its code runs."""

import inspect
import re

import diffusers
import pytest
import torch

from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.generic_models import MODELS, arguments_at, make, state, values


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


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_docs_name_the_classes_that_are_run_here(docs, name):
    transformer, arguments = make(name)
    adapter = GenericAdapter(transformer)
    adapter.trace(**arguments)
    rows = table(docs["Generic"])
    assert rows[type(transformer).__name__] == describe(adapter.branch_names) and set(rows) == set(MODELS)
    assert not adapter.trunk_left_out


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
    fused, refused = table(docs["Fused"]), table(docs["Not"])
    assert len(fused) == 2 and refused
    for name, branches in fused.items():
        adapter = adapt(few_layers(getattr(diffusers, name)))
        assert type(adapter) is not GenericAdapter and describe(adapter.branch_names) == branches
    for name in refused:
        if hasattr(diffusers, name):
            with pytest.raises(TypeError, match="no list of blocks"):
                GenericAdapter(few_layers(getattr(diffusers, name)))


def test_the_code_in_the_docs_runs(docs):
    transformer, arguments = make("SD3Transformer2DModel")
    timesteps = [900.0, 700.0, 500.0, 300.0, 200.0, 100.0]

    @torch.no_grad()
    def denoise(transformer, timesteps):
        return values([transformer(**arguments_at(arguments, s) | dict(timestep=torch.tensor([t]))).sample
                       for s, t in enumerate(timesteps)][-1:])

    names = dict(transformer=transformer, arguments=arguments, timesteps=timesteps, denoise=denoise)
    before, plain = state(transformer), denoise(transformer, timesteps)
    blocks = re.findall(r"```python\n(.*?)```", docs["Generic"], re.DOTALL)
    assert len(blocks) == 5 and not any("```python" in text for name, text in docs.items() if name != "Generic")
    for code in blocks:
        exec(code, names)
    adapter = names["adapter"]
    assert isinstance(adapter, GenericAdapter) and not adapter.left_out and not adapter.trunk_left_out
    assert names["schedule"].compute.all(1).tolist() == [True, False] * 3
    images = [plain, names["image"], names["other"]]
    assert not any(torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert names["cache"].filled == 1 and torch.equal(values(names["output"]), values(adapter(**arguments)))
    assert state(transformer) == before


def test_gradients_reach_the_scores(docs):
    """Of the row that the page makes."""
    transformer, arguments = make("SD3Transformer2DModel")
    adapter = adapt(transformer)
    cache = adapter.new_cache()
    with torch.no_grad():
        adapter(**arguments, cache=cache)
    scores = torch.full((len(adapter.branch_names),), 0.5, requires_grad=True)
    (line,) = re.findall(r"^output = .*row=scores.*$", docs["Generic"], re.MULTILINE)
    names = dict(adapter=adapter, arguments=arguments_at(arguments, 1), cache=cache, scores=scores)
    exec(line, names)
    values(names["output"]).sum().backward()
    assert scores.grad.abs().sum() > 0

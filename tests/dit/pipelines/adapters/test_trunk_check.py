"""Whether a model's trunk can be reused: nothing but the last block's output may reach what the model returns."""

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn

import harmonica_dit
from harmonica_dit.pipelines.adapters.generic import GenericAdapter
from support.cached_calls import STEPS, with_cache
from support.many_pipes import PIPES


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        return x + self.ff(x)


class Model(nn.Module):
    """Three blocks and a head; subclasses bring more into what they return."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(4, 4)

    def forward(self, hidden_states, timestep=None):
        states = [hidden_states]
        for block in self.blocks:
            states.append(block(self.between(states[-1])))
        return self.end(self.head(states[-1]), states)

    def between(self, x):
        return x

    def end(self, output, states):
        return (output,)


@dataclasses.dataclass
class Output:
    sample: torch.Tensor
    more: object = None


def skips(how):
    class Skips(Model):
        end = how
    return Skips


DEPENDS = "depends on more than the output of blocks.2"
REUSABLE = {"plain": lambda self, output, states: (output,),
            "a dataclass": lambda self, output, states: Output(output),
            "a dict": lambda self, output, states: dict(sample=output, more=None),
            "what entered": lambda self, output, states: (output + states[0],)}
NOT_REUSABLE = {"skip": (lambda self, output, states: (output + states[1],), DEPENDS),
                "skip times 0": (lambda self, output, states: (output + 0 * states[1],), DEPENDS),
                "skip in a dataclass": (lambda self, output, states: Output(output + states[1]), DEPENDS),
                "states beside": (lambda self, output, states: dict(sample=output, more=[states[2]]), DEPENDS),
                "in an object": (lambda self, output, states: (output, states.__len__), "returns more than tensors"),
                "in a dataclass's object": (lambda self, output, states: Output(output, object()), "more than tensors")}


@pytest.mark.parametrize("end", REUSABLE.values(), ids=REUSABLE)
@pytest.mark.parametrize("head", [1.0, 0.0])
def test_only_the_last_blocks_output_is_needed(end, head):
    """Also where a head that starts at 0 hides everything."""
    model = skips(end)()
    model.head.weight.data.mul_(head)
    adapter = GenericAdapter(model)
    adapter.trace(torch.randn(2, 4))
    assert adapter.trunk_left_out == "" and adapter.trunk_size == 8


@pytest.mark.parametrize("end, why", NOT_REUSABLE.values(), ids=NOT_REUSABLE)
def test_more_is_needed(end, why):
    adapter = GenericAdapter(skips(end)())
    adapter.trace(torch.randn(2, 4))
    assert why in adapter.trunk_left_out and adapter.trunk_size is None


def test_a_skip_connection_with_dropout_in_training_mode():
    """Both forwards of a trace may drop all of it."""
    class Drops(Model):
        def end(self, output, states):
            return (output + nn.functional.dropout(states[1], 0.95, self.training),)

    for seed in range(20):
        torch.manual_seed(seed)
        adapter = GenericAdapter(Drops().train())
        adapter.trace(torch.randn(1, 4))
        assert DEPENDS in adapter.trunk_left_out


def test_a_model_that_writes_into_its_blocks_outputs():
    """What stands in for them cannot be written into: then by branches, as the plain model."""
    class Writes(Model):
        def between(self, x):
            return x.mul_(0.5)

    model, x = Writes().requires_grad_(False), torch.randn(2, 4)
    adapter = GenericAdapter(model)
    expected = model(x.clone())[0]
    adapter.trace(x)
    assert adapter.trunk_left_out.startswith("without its blocks a forward fails: ")
    assert torch.equal(adapter(x, cache=adapter.new_cache())[0], expected)  # the trace wrote into a copy


class Kept:
    """A cache of a pipeline's, which its model fills."""

    def __init__(self):
        self.tensors = []


@pytest.mark.parametrize("what", ["object", "dict", "list"])
def test_a_trace_leaves_the_arguments_as_they_were(what):
    class Fills(Model):
        def forward(self, hidden_states, kept, timestep=None):
            if isinstance(kept, dict):
                kept.pop("scale")
            (kept.tensors if isinstance(kept, Kept) else kept["more"] if isinstance(kept, dict) else kept).append(1)
            return super().forward(hidden_states)

    kept = dict(object=Kept(), dict=dict(scale=1.0, more=[]), list=[])[what]
    before = copy.deepcopy(kept)
    adapter = GenericAdapter(Fills())
    adapter.trace(torch.randn(2, 4), kept=kept)
    assert adapter.trunk_left_out == ""
    assert (vars(kept) == vars(before)) if what == "object" else kept == before


def test_a_forward_with_nan_teaches_nothing():
    """The next call is looked at anew."""
    entry, pipe = PIPES["flux"], PIPES["flux"].pipe()
    expected = with_cache(entry, pipe)
    harmonica_dit.enable_cache(pipe, 1.7)
    entry.call(pipe, steps=STEPS, prompt_embeds=torch.full((1, 5, 16), torch.nan))
    summary = harmonica_dit.summary(pipe)
    assert summary.unit == "branch" and "was not finite" in summary.left_out["the trunk"]
    assert torch.equal(entry.call(pipe, steps=STEPS), expected) and harmonica_dit.summary(pipe).unit == "trunk"


@pytest.mark.parametrize("name", ["flux", "dit"])
def test_threads_trace_at_the_same_time(name):
    """One transformer in several pipelines, of images of several sizes: each counts its own forward alone."""
    entry = PIPES[name]
    pipes = [entry.pipe() for _ in range(4)]
    for pipe in pipes:
        pipe.transformer = pipes[0].transformer
    calls = [dict(batch=1 + i, seed=i, steps=STEPS) for i in range(4)]
    expected = []
    for pipe, call in zip(pipes, calls):
        image = with_cache(entry, pipe, **call)
        harmonica_dit.enable_cache(pipe, 1.7)
        entry.call(pipe, **call)
        expected.append((image, harmonica_dit.summary(pipe).as_dict()))
        harmonica_dit.enable_cache(pipe, 1.7)
    found, start, stance = [None] * 4, threading.Barrier(4), copy.copy(torch._dynamo.eval_frame._stance)

    def work(i):
        start.wait()
        found[i] = entry.call(pipes[i], **calls[i]), harmonica_dit.summary(pipes[i]).as_dict()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (image, summary), (expected_image, expected_summary) in zip(found, expected):
        assert torch.equal(image, expected_image) and summary == expected_summary
    assert torch._dynamo.eval_frame._stance == stance


def test_an_argument_that_a_trace_would_use_up_is_refused():
    class Takes(Model):
        def forward(self, hidden_states, parts):
            return super().forward(hidden_states + sum(parts))

    parts = iter([x for x in torch.randn(2, 2, 4)])
    generated = (part for part in [torch.randn(2, 4)])
    adapter, x = GenericAdapter(Takes()), torch.randn(2, 4)
    adapter.trace(x, parts=parts)
    assert len(list(parts)) == 2  # a list's iterator can be copied
    with pytest.raises(ValueError, match="its argument of type generator cannot be copied for that .*; pass tensors"):
        adapter.trace(x, parts=generated)
    assert len(list(generated)) == 1


@pytest.mark.parametrize("error, passes", [(torch.OutOfMemoryError, True), (IndexError, False)])
def test_a_forward_without_blocks_that_fails(error, passes):
    """A model that cannot go without is left alone; a device that is full says nothing of the model."""
    class Looks(Model):
        def forward(self, hidden_states):
            x = hidden_states
            for block in self.blocks:
                x = block(x)
                if x.isnan().any():
                    raise error("seen")
            return x

    adapter, x = GenericAdapter(Looks()), torch.randn(2, 4)
    if passes:
        with pytest.raises(error, match="seen"):
            adapter.trace(x)
    else:
        adapter.trace(x)
        assert adapter.trunk_left_out == "without its blocks a forward fails: seen"

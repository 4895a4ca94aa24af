"""A graph is replayed only while the weights that it reads are where they were."""

import weakref
from typing import NamedTuple

import numpy as np
import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs.weights import Snapshot, handles

pytestmark = pytest.mark.usefixtures("no_grad")


class Pair(NamedTuple):
    net: torch.nn.Module
    scale: float


def version(constant) -> list[int]:
    return Snapshot.of(constant).versions


def test_a_module_is_walked_again_only_after_one_was_given_a_part(monkeypatch):
    """And its version is another one after anything that would make a recording read other weights."""
    net, walks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Linear(2, 2)])), []
    walk = net.parameters
    monkeypatch.setattr(net, "parameters", lambda: walks.append(1) or walk())
    kept = Snapshot.of(net)  # a recording would
    versions = [*map(version, [(net, 1.5), net, ("x", (1, Pair(net, 2.0))), net.forward])]
    assert len({*map(tuple, versions)}) == 1 and len(versions[0]) == 1 and len(walks) == 1
    changes = (lambda: net.double(), lambda: net.half(), lambda: setattr(net, "2", torch.nn.Linear(2, 2)),
               lambda: setattr(net[0], "weight", torch.nn.Parameter(torch.zeros(2, 2))),
               lambda: setattr(net[0].bias, "data", torch.zeros(2)),
               lambda: net[1].insert(0, torch.nn.Linear(2, 2)), lambda: net[1].pop(0), lambda: net[1].pop(0))
    for change in changes:
        change()
        versions.append(version(net))
        assert version((net, "x")) == versions[-1]
    assert len({*map(tuple, versions)}) == 1 + len(changes)
    assert version(torch.nn.Linear(2, 2)) not in versions and version((True, None, "net")) == []
    assert kept.is_stale() and Snapshot.of((net, 1)).weights == kept.weights


def test_memory_is_told_apart_by_address_and_dtype():
    x = torch.zeros(3)
    views = [x, x[1:], x.view(torch.int32), x.view(torch.bits8), x.view(torch.bits16), x.view(torch.float8_e4m3fn)]
    found = [handles([x, view]).places() for view in views]
    assert len({*found}) == len(views) and len({*map(len, found)}) == 1
    assert handles([x, x[1:]]).places() == found[1] and handles([]).places() == b""
    with pytest.raises(TypeError, match="incompatible function arguments"):
        handles([3])


def test_handles_follow_their_tensors_and_keep_no_memory_that_these_left():
    arrays = [np.zeros(3), np.ones(5, np.float32)]
    held, other = map(torch.from_numpy, arrays)
    alive = [*map(weakref.ref, arrays)]
    del arrays
    tensors = handles([held])
    before = tensors.places()
    held.data = other
    assert tensors.places() == handles([other]).places() != before
    assert alive[0]() is None and alive[1]() is not None
    del held, other
    assert alive[1]() is not None  # a recording may still read it
    del tensors
    assert alive[1]() is None


def test_a_weight_without_memory_is_an_error():
    with pytest.raises(RuntimeError, match="tensor 1 has no memory that a graph could read"):
        handles([torch.ones(2), torch.eye(3).to_sparse()]).places()


def test_buffers_and_what_quantized_weights_are_made_of(recorder):
    """They are given to a module without a word: `half()` puts buffers in their places, `.qdata` is an attribute."""
    layer = torch.nn.Module()
    layer.register_buffer("shift", torch.randn(4))
    layer.register_buffer("none", None)
    layer.forward = lambda x: x + layer.shift
    executor, x = hk.compile(lambda net, x: net(x)), torch.randn(2, 4)
    for change in (lambda: None, lambda: layer.double(), lambda: setattr(layer, "shift", torch.randn(4)),
                   lambda: layer.shift.mul_(2)):
        change()
        for _ in range(3):
            assert torch.equal(executor(layer, x), layer(x))
        assert executor.graphs == 1
    assert [what for what, _ in recorder.log].count("free") == 2

    quantize = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(4, 4)
    quantize.quantize_(layer, quantize.Int8WeightOnlyConfig())
    kept, versions = Snapshot.of(layer), [version(layer)]
    layer.weight.qdata.mul_(2)
    assert version(layer) == versions[0]
    for name in "qdata", "scale":
        setattr(layer.weight, name, getattr(layer.weight, name).clone())
        versions.append(version(layer))
        assert version(layer) == versions[-1]
    assert len({*map(tuple, versions)}) == 3 and Snapshot.of(layer).weights == kept.weights


def test_weights(recorder):
    """Changed in place they are the graph's too; moved or cast, the module is recorded anew."""
    layer = torch.nn.Linear(4, 4)
    executor, x = hk.compile(lambda net, x: net(x)), torch.randn(2, 4)
    for _ in range(3):
        executor(layer, x)
    layer.weight.mul_(2)
    assert torch.equal(executor(layer, x), layer(x)) and executor.graphs == 1
    layer.double()
    for _ in range(3):
        assert torch.equal(executor(layer, x.double()), layer(x.double()))
    assert executor.graphs == 1
    layer.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    for _ in range(3):
        assert torch.equal(executor(layer, x.double()), layer(x.double()))
    assert executor.graphs == 1 and [what for what, _ in recorder.log].count("free") == 2


def test_all_graphs_that_read_what_is_gone_are_freed_together(recorder):
    layer, other = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    executor, x = hk.compile(lambda net, x, y: net(x) + y), torch.randn(2, 4)
    for _ in range(2):
        for y in range(3):
            executor(layer, x, y), executor(other, x, y)
    assert executor.graphs == 6
    layer.weight.data = torch.randn(4, 4)
    assert torch.equal(executor(layer, x, 2), layer(x) + 2) and executor.graphs == 3


def test_weights_are_let_go_with_the_last_graph(recorder):
    """PyTorch swaps tensors that have one owner only, and memory that a module has left is freed at once."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    array = np.zeros(4, np.float32)
    layer.register_buffer("shift", torch.from_numpy(array))
    alive = weakref.ref(array)
    del array
    executor = hk.compile(layer)
    for _ in range(3):
        executor(x)
    layer.register_buffer("shift", torch.zeros(4))
    assert alive() is None and executor.graphs == 1
    other = torch.nn.Parameter(torch.ones(4, 4))
    with pytest.raises(RuntimeError, match="reference"):
        torch.utils.swap_tensors(layer.weight, other)
    executor.reset()
    torch.utils.swap_tensors(layer.weight, other)
    for _ in range(3):
        assert torch.equal(executor(x), layer(x))


@pytest.mark.parametrize("wrap", [lambda net: Pair(net, 1.0), lambda net: ((net, 1), 2)])
def test_weights_of_modules_inside_tuples(recorder, wrap):
    def run(held, x):
        while isinstance(held, tuple):
            held = held[0]
        return held(x)

    layer, executor, x = torch.nn.Linear(4, 4), hk.compile(run), torch.randn(2, 4)
    for _ in range(2):
        for _ in range(3):
            assert torch.equal(executor(wrap(layer), x), layer(x))
        layer.weight.data = torch.randn(4, 4)


def test_weights_of_the_module_whose_method_it_is(recorder):
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    executors = [hk.compile(layer), hk.compile(layer.forward)]
    for _ in range(2):
        for executor in 3 * executors:
            assert torch.equal(executor(x), layer(x))
        layer.weight.data = torch.randn(4, 4)


def test_what_came_once_is_not_recorded_with_other_weights(recorder):
    """The first run tunes and compiles for the weights that there are; a recording must not."""
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    executor = hk.compile(layer)
    executor(x)
    layer.weight.data = torch.randn(4, 4)
    executor(x)
    assert executor.graphs == 0
    executor(x)
    assert executor.graphs == 1

"""Executors: what is recorded when, with a recorder that calls again where a GPU would replay."""

from itertools import product

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs import weights
from support.cpu_recorder import CpuRecorder
from support.three_branches import double

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("options, words", [
    (dict(mode="fast"), 'mode: got \'fast\', expected "captured"'), (dict(graphs=0), "graphs: got 0"),
    (dict(graphs=True), "graphs"), (dict(graphs=2.5), "graphs"), (dict(function=3), "function: got int"),
])
def test_bad_settings(options, words):
    with pytest.raises((TypeError, ValueError), match=words):
        hk.compile(**(dict(function=double) | options))


@pytest.mark.parametrize("call, error, words", [
    (lambda f, x: f(), ValueError, "at least one tensor"),
    (lambda f, x: f(x, {"a": 1}), TypeError, "argument 1: got dict"),
    (lambda f, x: f(x, y=(x, 1)), TypeError, "y: got tuple.*of its own"),
    (lambda f, x: f(x, y=[x]), TypeError, "y: got list"),
    (lambda f, x: f(x, y=x.to("meta")), ValueError, "y: is on meta, but argument 0 is on cpu"),
    (lambda f, x: torch.enable_grad()(f)(x), RuntimeError, r"torch.no_grad\(\)"),
])
@pytest.mark.parametrize("recorded", [True, False])
def test_bad_calls(monkeypatch, call, error, words, recorded):
    """Refused alike with and without a GPU, so that what runs here is not refused there."""
    if recorded:
        CpuRecorder.install(monkeypatch)
    with pytest.raises(error, match=words):
        call(hk.compile(double), torch.ones(3))


def test_without_a_gpu_every_call_runs():
    calls, executor = [], hk.compile(lambda x: calls.append(0) or torch.sin(x))
    x = torch.randn(5)
    for _ in range(4):
        assert torch.equal(executor(x), torch.sin(x))
    assert len(calls) == 4 and executor.graphs == 0


def test_recorded_the_second_time(recorder):
    calls, executor = [], hk.compile(lambda x, y=0: calls.append(recorder.recording) or double(x, y))
    kept = []
    for i in range(5):
        x, y = torch.randn(3, 4), torch.randn(4)
        kept.append((executor(x, y=y), double(x, y)))
        assert executor.graphs == min(i, 1)
    assert calls == [False, True, *[False] * 4]  # the first, the recording, four replays
    for got, want in kept:  # each result is the caller's own
        assert torch.equal(got, want)


def test_results_in_tuples(recorder):
    executor = hk.compile(lambda x: (x + 1, x.sum()))
    for _ in range(3):
        x = torch.randn(4)
        got = executor(x)
        assert torch.equal(got[0], x + 1) and torch.equal(got[1], x.sum())
    with pytest.raises(TypeError, match="returned float"):
        hk.compile(lambda x: 2.0)(x)


def test_what_is_another_graph(recorder):
    """Shapes, dtypes and constants; by position or name; never the values."""
    executor = hk.compile(double)
    calls = [lambda f, x: f(x), lambda f, x: f(x[:2]), lambda f, x: f(x.double()), lambda f, x: f(x, 3),
             lambda f, x: f(x, y=x), lambda f, x: f(x, power=2)]
    for _ in range(3):
        for call in calls:
            x = torch.randn(5)
            assert torch.equal(call(executor, x), call(double, x))
    assert executor.graphs == len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        executor(x), executor(x)
    assert executor.graphs == len(calls) + 1


def test_what_came_once_and_long_ago_makes_room_for_what_comes_now(recorder):
    """No more calls that came once are remembered than graphs may be kept."""
    executor = hk.compile(double, graphs=2)
    for n in (1, 2, 3, 4):
        executor(torch.randn(n))
    executor(torch.randn(4))
    assert executor.graphs == 1  # of the last; an executor that forgot it would never record what is new


def test_tf32_is_another_graph(recorder):
    executor, x, places = hk.compile(double), torch.randn(3), (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [place.allow_tf32 for place in places]
    try:
        for allowed in 2 * list(product((True, False), repeat=2)):  # those of the first round again
            for place, value in zip(places, allowed):
                place.allow_tf32 = value
            executor(x), executor(x)
        assert executor.graphs == 4
    finally:
        for place, value in zip(places, before):
            place.allow_tf32 = value


def test_the_longest_unused_graph_goes_first(recorder):
    executor = hk.compile(double, graphs=2)
    x = torch.randn(3)

    def call_twice(y):
        for _ in range(2):
            assert torch.equal(executor(x, y), double(x, y))

    def count_freed():
        return [what for what, _ in recorder.log].count("free")

    call_twice(1), call_twice(2)
    assert (executor.graphs, count_freed()) == (2, 0)
    executor(x, 1)
    call_twice(3)  # 2 goes
    assert (executor.graphs, count_freed()) == (2, 1)
    executor(x, 1)
    assert count_freed() == 1
    call_twice(2)  # 3 goes
    assert (executor.graphs, count_freed()) == (2, 2)
    executor.reset()
    assert (executor.graphs, count_freed()) == (0, 4)
    call_twice(1)
    assert [what for what, _ in recorder.log if what != "free"] == ["new pool", "pool", "pool", "pool", "new pool"]
    for y in range(100, 200):
        executor(x, y)
    assert len(executor._seen) <= 2 and executor.graphs == 1


def test_random_numbers_are_refused(recorder):
    executor = hk.compile(lambda x: x + torch.rand(3))
    with pytest.raises(RuntimeError, match='draws random numbers.*executor="eager"'):
        executor(torch.ones(3))


def test_memory_that_is_not_there_is_said_as_it_is(recorder):
    """Callers try again with less."""
    def exhaust_memory(x):
        if recorder.recording:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    executor = hk.compile(exhaust_memory)
    executor(torch.ones(3))
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        executor(torch.ones(3))


def test_a_module_is_walked_again_only_after_one_was_given_a_part(monkeypatch):
    """And its number is another one after anything that would make a recording read other weights."""
    net, walks = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([torch.nn.Linear(2, 2)])), []
    walk = net.parameters
    monkeypatch.setattr(net, "parameters", lambda: walks.append(1) or walk())
    numbers = [weights.weights((net, 1.5)) for _ in range(3)]
    assert len({*numbers}) == 1 and len(numbers[0]) == 1 and len(walks) == 1
    changes = (lambda: net.double(), lambda: net.half(), lambda: setattr(net, "2", torch.nn.Linear(2, 2)),
               lambda: setattr(net[0], "weight", torch.nn.Parameter(torch.zeros(2, 2))),
               lambda: net[1].insert(0, torch.nn.Linear(2, 2)), lambda: net[1].pop(0), lambda: net[1].pop(0))
    for change in changes:
        change()
        numbers.append(weights.weights(net))
        assert weights.weights((net, "x")) == numbers[-1]
    assert len({*numbers}) == 1 + len(changes)
    assert weights.weights(torch.nn.Linear(2, 2)) not in numbers and weights.weights((True, None)) == ()


def test_memory_is_told_apart_by_address_and_dtype():
    x = torch.zeros(3)
    views = [x, x[1:], x.view(torch.int32), x.view(torch.bits8), x.view(torch.bits16)]
    found = [weights.kernels.memory_of(weights.DLPACK, [x, view]) for view in views]
    assert len({*found}) == len(views) and len({*map(len, found)}) == 1
    assert weights.kernels.memory_of(weights.DLPACK, [x, x[1:]]) == found[1]
    with pytest.raises(AttributeError, match="data_ptr"):
        weights.kernels.memory_of(weights.DLPACK, [3])


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
    assert executor.graphs == 3

    quantize = pytest.importorskip("torchao.quantization")
    layer = torch.nn.Linear(4, 4)
    quantize.quantize_(layer, quantize.Int8WeightOnlyConfig())
    numbers = [weights.weights(layer)]
    layer.weight.qdata.mul_(2)
    assert weights.weights(layer) == numbers[0]
    for name in "qdata", "scale":
        setattr(layer.weight, name, getattr(layer.weight, name).clone())
        numbers.append(weights.weights(layer))
        assert weights.weights(layer) == numbers[-1]
    assert len({*numbers}) == 3


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
    assert executor.graphs == 2
    layer.weight = torch.nn.Parameter(torch.randn(4, 4, dtype=torch.float64))
    for _ in range(3):
        assert torch.equal(executor(layer, x.double()), layer(x.double()))
    assert executor.graphs == 3


def test_objects_that_hold_tensors(recorder):
    class Scale:
        def __init__(self, power, by):
            self.power, self.by = power, by

        def graph_parts(self):
            return self.power, (self.by,), lambda by: Scale(self.power, by)

    executor = hk.compile(lambda scale, x: (scale.by * x) ** scale.power)
    for power in (1, 2, 1, 2, 1, 2):
        by, x = torch.randn(3), torch.randn(2, 3)
        assert torch.equal(executor(Scale(power, by), x), (by * x) ** power)
    assert executor.graphs == 2


def test_any_mode_without_grad(recorder):
    """Recorded in one of inference_mode and no_grad, replayed in the other."""
    executor, x = hk.compile(double), torch.randn(3)
    with torch.inference_mode():
        executor(x), executor(x)
    assert torch.equal(executor(x + 1), double(x + 1))
    with torch.inference_mode():
        assert torch.equal(executor(x), double(x))

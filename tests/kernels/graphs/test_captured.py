"""Executors: what is recorded when, with a recorder that calls again where a GPU would replay."""

from dataclasses import dataclass
from itertools import product

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs.keys import typed
from support.cpu_recorder import CpuRecorder
from support.three_branches import double

pytestmark = pytest.mark.usefixtures("no_grad")


@dataclass(frozen=True)
class Frozen:
    """Has a hash, which fails."""

    parts: list


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
    (lambda f, x: f(x, y=Frozen([1])), TypeError, "y: got Frozen.*what can be hashed"),
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


def test_a_device_that_has_no_graphs_and_no_autocast(recorder):
    x, executor = torch.ones(3, device="meta"), hk.compile(double)
    assert [executor(x).device.type for _ in range(3)] == 3 * ["meta"] and executor.graphs == 0


@pytest.mark.parametrize("recorded", [True, False])
def test_a_list_stays_a_list(monkeypatch, recorded):
    """An index that is a list takes rows, one that is a tuple an element."""
    if recorded:
        CpuRecorder.install(monkeypatch)
    executor, x = hk.compile(lambda x, rows: x[rows].clone()), torch.randn(3, 3)
    for _ in range(3):
        assert torch.equal(executor(x, [0, 1]), x[:2])
    assert executor.graphs == recorded


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


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, x), lambda x: ("x", x), lambda x: (0, (x,))])
def test_equal_constants_of_other_types_are_other_graphs(recorder, wrap):
    """1 == 1.0 == True, but a function may do other things with them, as a multiplication of integers does."""
    def add_type(x, constant):
        while isinstance(constant, tuple):
            constant = constant[-1]
        return x + len(type(constant).__name__)

    executor, x = hk.compile(add_type), torch.randn(3)
    for _ in range(3):
        for constant in (1, 1.0, True):
            assert torch.equal(executor(x, wrap(constant)), add_type(x, constant))
    assert executor.graphs == 3
    assert typed(("x", 1, 1.0)) != typed(("x", 1.0, 1))


def test_a_tensor_on_another_device_is_refused_after_a_recording_too(recorder):
    executor, x = hk.compile(double), torch.ones(3)
    for _ in range(3):
        executor(x, x)
    with pytest.raises(ValueError, match="argument 1: is on meta"):
        executor(x, x.to("meta"))


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
    freed = count_freed()
    executor(x, 1), call_twice(2), call_twice(3), call_twice(2)  # recorded after 1 was used, so 1 goes
    assert count_freed() == freed + 1


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


def test_objects_that_hold_tensors(recorder):
    class Scale:
        def __init__(self, power, by):
            self.power, self.by = power, by

        def graph_parts(self):
            return self.power, (self.by,), lambda by: Scale(self.power, by)

    executor = hk.compile(lambda scale, x: (scale.by * x) ** scale.power)
    for power in (1, 2, 1, 2, 1, 2):
        for shape in ((3,), (1,)):
            by, x = torch.randn(shape), torch.randn(2, 3)
            assert torch.equal(executor(Scale(power, by), x), (by * x) ** power)
    assert executor.graphs == 4


def test_any_mode_without_grad(recorder):
    """Recorded in one of inference_mode and no_grad, replayed in the other."""
    executor, x = hk.compile(double), torch.randn(3)
    with torch.inference_mode():
        executor(x), executor(x)
    assert torch.equal(executor(x + 1), double(x + 1))
    with torch.inference_mode():
        assert torch.equal(executor(x), double(x))

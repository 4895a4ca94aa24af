"""Executors. What is recorded when, and from which memory, is tested here with a recorder that calls again where a GPU
would replay; the recording itself needs a GPU (marker `gpu`)."""

import gc
from itertools import product

import pytest
import torch
import torch.nn.functional as F

import harmonica_kernels as hk
from support.cpu_recorder import CpuRecorder

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def recorder(monkeypatch):
    CpuRecorder.install(monkeypatch)
    return CpuRecorder


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def double(x, y=0, power=1):
    return (2 * x + y) ** power


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

    def twice(y):
        for _ in range(2):
            assert torch.equal(executor(x, y), double(x, y))

    def freed():
        return [what for what, _ in recorder.log].count("free")

    twice(1), twice(2)
    assert (executor.graphs, freed()) == (2, 0)
    executor(x, 1)
    twice(3)  # 2 goes
    assert (executor.graphs, freed()) == (2, 1)
    executor(x, 1)
    assert freed() == 1
    twice(2)  # 3 goes
    assert (executor.graphs, freed()) == (2, 2)
    executor.reset()
    assert (executor.graphs, freed()) == (0, 4)
    twice(1)
    assert [what for what, _ in recorder.log if what != "free"] == ["new pool", "pool", "pool", "pool", "new pool"]
    for y in range(100, 200):
        executor(x, y)
    assert len(executor._seen) <= 2 and executor.graphs == 1


def test_random_numbers_are_refused(recorder):
    executor = hk.compile(lambda x: x + torch.rand(3))
    with pytest.raises(RuntimeError, match='draws random numbers.*executor="eager"'):
        executor(torch.ones(3))


def test_a_recording_that_fails_changes_nothing(recorder):
    """The message says what to do, and the cache goes on from where it was."""
    cache, net = hk.FeatureCache(2), Toy()
    x = torch.randn(2, 3, 8)

    def waits(x, cache, gate):
        y = net(x, cache=cache, row=gate)
        if recorder.recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return y

    net(x, cache=cache), net(x + 1, cache=cache)
    executor = hk.compile(waits)
    row, before = (True, False, True), cache._state()
    executor(x, cache, row)
    net(x, cache=cache, row=row)  # swaps the slots back
    assert cache._state() == before
    with pytest.raises(RuntimeError, match=r"waits cannot be captured: operation not permitted.*\n.*\.item\(\)"):
        executor(x, cache, row)
    assert cache._state() == before and executor.graphs == 0
    other = hk.FeatureCache(2).copy_(cache)
    assert torch.equal(net(x, cache=cache, row=row), net(x, cache=other, row=row))


def test_memory_that_is_not_there_is_said_as_it_is(recorder):
    """Callers try again with less."""
    def big(x):
        if recorder.recording:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    executor = hk.compile(big)
    executor(torch.ones(3))
    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory$"):
        executor(torch.ones(3))


class Toy(torch.nn.Module):
    """Three branches in random weights."""

    def __init__(self, D=8):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(D, D) for _ in range(3))
        self.branches = [hk.Branch(lambda h, _, layer=layer: torch.tanh(layer(h)), gate=False)
                         for layer in self.layers]
        self.mod = hk.Modulation([None] * 4, [None] * 4, [None] * 3)

    def forward(self, x, **row):
        return hk.cached_forward(self.branches, x, self.mod, **row)


ROWS = list(product((True, False), repeat=3))


@pytest.mark.parametrize("history", [1, 2])
def test_caches(recorder, history):
    """Random schedules, trajectory after trajectory in two caches by turns: as eager with a fresh cache each time."""
    net = Toy()
    executor = hk.compile(net)
    caches = [hk.FeatureCache(history) for _ in range(2)]
    generator = torch.Generator().manual_seed(history)
    schedules = [[(True,) * 3] + [ROWS[int(i)] for i in torch.randint(8, (5,), generator=generator)] for _ in range(3)]
    for n in range(24):
        rows = schedules[n % 3]
        for cache in caches:
            cache.rewind()
        fresh = [hk.FeatureCache(history) for _ in caches]
        xs = [torch.randn(2, 5, 8) for _ in caches]
        for s, row in enumerate(rows):
            for i, x in enumerate(xs):
                filled_twice = history == 2 and all(fresh[i].filled(k) == 2 for k in range(3))
                e = tuple(0.0 if c else 0.5 for c in row) if filled_twice and s % 2 else None
                want = net(x, row=row, forecast_weights=e, cache=fresh[i])
                got = executor(x, row=row, forecast_weights=e, cache=caches[i])
                assert torch.equal(got, want)
                assert [caches[i].filled(k) for k in range(3)] == [fresh[i].filled(k) for k in range(3)]
                for k in range(3):
                    assert torch.equal(caches[i].latest(k), fresh[i].latest(k))
                xs[i] = want
    assert sum(recording.graph.replays for recording in executor._recordings.values()) > 100


def test_a_reset_cache_has_other_memory(recorder):
    """Graphs that know the old memory are not replayed on the new one; the old one stays theirs."""
    net, cache = Toy(), hk.FeatureCache()
    executor = hk.compile(net)
    x = torch.randn(2, 5, 8)
    for _ in range(3):
        net(x, cache=cache)
        for _ in range(3):
            assert torch.equal(executor(x, row=ROWS[5], cache=cache), net(x, row=ROWS[5], cache=cache))
        cache.reset()
        x = torch.randn(2, 5, 8)
    assert executor.graphs == 3


def test_rewind_keeps_the_memory():
    net, cache = Toy(), hk.FeatureCache(2)
    x = torch.randn(2, 5, 8)
    net(x, cache=cache)
    first = cache._state()
    net(x, cache=cache, row=ROWS[3])
    address = cache._arena.data_ptr()
    cache.rewind()
    assert [cache.filled(k) for k in range(3)] == [0] * 3
    with pytest.raises(ValueError, match="holds no output"):
        net(x, cache=cache, row=ROWS[3])
    net(x, cache=cache)
    assert cache._arena.data_ptr() == address and cache._state() == first
    hk.FeatureCache().rewind()


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


# On a GPU.


def two_layers(x, w, v):
    return F.gelu(x @ w) @ v


@pytest.fixture
def tensors():
    return [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((64, 128), (128, 512), (512, 128))]


class TestOnAGpu:
    pytestmark = gpu

    def test_capture_equals_eager(self, tensors):
        executor = hk.compile(two_layers)
        for _ in range(4):
            tensors[0].normal_()
            assert torch.equal(executor(*tensors), two_layers(*tensors))
        assert executor.graphs == 1

    def test_a_new_shape_is_captured_anew(self, tensors):
        x, w, v = tensors
        executor = hk.compile(two_layers)
        for n in (64, 7, 64, 7, 1, 1, 64, 7):
            assert torch.equal(executor(x[:n], w, v), two_layers(x[:n].clone(), w, v))
        assert executor.graphs == 3

    def test_graphs_share_one_pool_and_its_memory_returns(self):
        def big(x, y):
            return ((x + y).cumsum(0) * 2).sum(0)  # two intermediate results of 64 MiB

        x = torch.randn(1 << 24, 1, device="cuda")
        big(x, 0), torch.cuda.synchronize(), torch.cuda.empty_cache()
        start = torch.cuda.memory_reserved()
        executor, reserved = hk.compile(big, graphs=3), []
        for y in range(9):
            for _ in range(3):
                torch.testing.assert_close(executor(x, y), big(x, y))
            torch.cuda.empty_cache()
            reserved.append(torch.cuda.memory_reserved() - start)
        assert executor.graphs == 3
        assert reserved[-1] <= reserved[2] + (1 << 21)  # evicted graphs give up what they held
        assert reserved[2] < 3 * (x.nbytes * 3)  # inputs of three graphs, and one pool for what lies between
        executor.reset()
        del executor
        gc.collect(), torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() - start < 1 << 25  # at most a matrix library's workspace

    @pytest.mark.parametrize("function, words", [
        (lambda x: x * x.sum().item(), "cannot be captured"), (lambda x: x[x > 0], "cannot be captured"),
        (lambda x: x + torch.ones(3).to(x.device), "cannot be captured"),
        (lambda x: x + torch.randn(3, device=x.device), "draws random numbers"),
        (lambda x: x + torch.randn(3).to(x.device), "draws random numbers")])
    def test_what_cannot_be_captured(self, function, words):
        """Two calls at most, and then the device, the stream and the next capture are in order."""
        executor, x = hk.compile(function), torch.ones(3, device="cuda")
        stream = torch.cuda.current_stream()
        with pytest.raises(RuntimeError, match=words):
            executor(x), executor(x)
        assert torch.cuda.current_stream() == stream and not torch.cuda.is_current_stream_capturing()
        torch.cuda.empty_cache()
        torch.randn(3, device="cuda")
        torch.zeros(3).pin_memory().to("cuda", non_blocking=True)
        good = hk.compile(double)
        for i in range(3):
            assert torch.equal(good(x + i), double(x + i))
        assert good.graphs == 1

    def test_caches(self):
        net, cache = Toy().cuda(), hk.FeatureCache(2)
        executor = hk.compile(net)
        for _ in range(6):
            cache.rewind()
            fresh, x = hk.FeatureCache(2), torch.randn(2, 5, 8, device="cuda")
            for row, e in ((None, None), ((True, False, True), None), (None, None), ((False, True, False), (1, 0, 1))):
                want = net(x, row=row, forecast_weights=e, cache=fresh)
                assert torch.equal(executor(x, row=row, forecast_weights=e, cache=cache), want)
                x = want
        assert executor.graphs == 4

    def test_autocast(self):
        layer, x = torch.nn.Linear(64, 64).cuda(), torch.randn(4, 64, device="cuda")
        executor = hk.compile(layer)
        for _ in range(4):
            with torch.autocast("cuda", torch.bfloat16):
                x.normal_()
                assert torch.equal(executor(x), layer(x))
            torch.cuda.empty_cache()
        assert executor.graphs == 1

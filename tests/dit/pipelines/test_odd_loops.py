"""`enable_cache` on loops that are not diffusers': when a step ends, errors, calls in calls, what stays in memory."""

import gc
import threading
import warnings
import weakref

import pytest
import torch

import harmonica_dit
from harmonica_dit.pipelines.plans import KEPT, _keep
from support.own_loops import SPEEDUP, OwnLoop, check_computed, check_reused, make_own, with_cache


def test_the_scheduler_is_never_stepped():
    class NeverSteps(OwnLoop):
        def advance(self, output, t, x):
            return x - output / 8

    check_computed(make_own(NeverSteps))


def test_the_scheduler_is_stepped_twice():
    """As Cosmos does: once for the image that is predicted, once for the step."""
    class StepsTwice(OwnLoop):
        def advance(self, output, t, x):
            super().advance(output, t, x)
            self.scheduler._step_index -= 1
            return super().advance(output, t, x)

    expected, _ = with_cache(make_own(OwnLoop))
    found, summary = with_cache(make_own(StepsTwice))
    assert torch.equal(found, expected) and not any(stream.fallbacks for stream in summary.streams)


def test_a_scheduler_of_the_loops_own_is_stepped_too():
    """For sound, as LTX 2's is: its steps are not the image's."""
    class WithSound(OwnLoop):
        def steps(self):
            self.sound = type(self.scheduler).from_config(self.scheduler.config)
            self.sound.set_timesteps(8)
            return super().steps()

        def predict(self, x, t, i):
            output = super().predict(x, t, i)
            self.sound.set_timesteps(8)
            self.sound.step(output, self.sound.timesteps[i], x)
            return output

    check_reused(make_own(WithSound))


def test_two_loops_over_the_same_timesteps():
    """Piece after piece, as long videos are made: a progress bar each, and no new timesteps."""
    class Pieces(OwnLoop):
        def steps(self):
            for _ in range(2):
                self.scheduler._step_index = None
                yield from self.progress_bar(self.scheduler.timesteps)

    found, summary = with_cache(make_own(Pieces))
    assert [stream.steps for stream in summary.streams] == [8] * 2 and summary.cur == 0.5
    assert not any(stream.fallbacks for stream in summary.streams)


@pytest.mark.filterwarnings("ignore:pipe. the cache reused nothing")
def test_the_transformer_is_left_out_of_some_steps():
    """By a cache of the loop's own. No forecast is made over more steps than the schedule has them."""
    class Skips(OwnLoop):
        def predict(self, x, t, i):
            if i not in self.options["skipped"]:
                self.output = super().predict(x, t, i)
            return self.output

    pipe = make_own(Skips)
    found, summary = with_cache(pipe, skipped=(1, 3, 5, 7))  # all that would have been forecast
    assert torch.equal(found, pipe(skipped=(1, 3, 5, 7))) and summary.cur == 0
    _, summary = with_cache(pipe, skipped=(2, 3, 4))
    for stream in summary.streams:
        assert stream.steps == 5 and list(stream.fallbacks.values()) == [1]
        assert "older than any that the schedule reuses" in next(iter(stream.fallbacks))


def test_an_error_that_the_loop_catches():
    """Out of memory, and again: the step is computed from nothing, and the next ones go on."""
    class Retries(OwnLoop):
        def forward(self, x, t, text):
            try:
                return super().forward(x, t, text)
            except MemoryError:
                return super().forward(x, t, text)

    pipe, count = make_own(Retries), iter(range(1000))

    def fail(*_):
        if next(count) == 4:  # step 4, the first call
            raise MemoryError

    expected = pipe()
    handle = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(fail)
    found, summary = with_cache(pipe)
    handle.remove()
    assert (found - expected).norm() < 0.3 * expected.norm()
    assert [dict(stream.fallbacks) for stream in summary.streams] == [{"there was nothing to reuse yet": 1}, {}]
    assert [stream.steps for stream in summary.streams] == [8, 8]


def test_a_progress_bar_with_arguments_of_its_own():
    class Bar(OwnLoop):
        def progress_bar(self, iterable=None, total=None, desc="", **settings):
            return super().progress_bar(iterable, total)

        def steps(self):
            with self.progress_bar(total=8, desc="denoising", colour="red"):
                return list(self.scheduler.timesteps)

    check_reused(make_own(Bar))


def test_a_call_that_returns_before_its_loop():
    """A generator; and a loop in another thread."""
    class Streams(OwnLoop):
        def __call__(self, **options):
            yield super().__call__(**options)

    class Threads(OwnLoop):
        def __call__(self, **options):
            found = []
            thread = threading.Thread(target=lambda: found.append(super(Threads, self).__call__(**options)))
            thread.start()
            thread.join()
            return found[0]

    plain = make_own(OwnLoop)()
    for cls in (Streams, Threads):
        pipe = make_own(cls)
        with pytest.warns(UserWarning, match="returned before it called the transformer, or called it in another"):
            found, _ = with_cache(pipe)
        assert torch.equal(next(found) if cls is Streams else found, plain)


def test_one_call_inside_another():
    """A pipeline whose call runs itself, at another resolution first."""
    class Twice(OwnLoop):
        def __call__(self, again=True, **options):
            first = self(again=False, seed=1) if again else 0
            return super().__call__(**options) + first

    pipe, single = make_own(Twice), make_own(OwnLoop)
    expected = with_cache(single)[0] + with_cache(single, seed=1)[0]
    assert torch.equal(with_cache(pipe)[0], expected)


def test_nothing_stays_in_memory():
    """Neither a transformer that was exchanged, nor one whose pipeline is gone while the handle is kept."""
    pipe, other = make_own(OwnLoop), make_own(OwnLoop)
    handle = harmonica_dit.enable_cache(pipe, SPEEDUP)
    pipe()
    gone = [weakref.ref(pipe.transformer)]
    pipe.transformer = other.transformer
    pipe()
    gc.collect()
    assert gone[0]() is None
    gone = [weakref.ref(part) for part in (pipe, pipe.transformer)]
    harmonica_dit.disable_cache(pipe)
    del pipe, other
    gc.collect()
    assert [part() for part in gone] == [None, None] and handle.summary().speedup >= SPEEDUP


def test_the_summary_is_of_the_last_call_also_if_it_failed():
    class Fails(OwnLoop):
        def advance(self, output, t, x):
            if self.options.get("fails") and t < 700:
                raise KeyboardInterrupt
            return super().advance(output, t, x)

    pipe = make_own(Fails)
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    pipe()
    with pytest.raises(KeyboardInterrupt), warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(fails=True)
    assert 0 < harmonica_dit.summary(pipe).streams[0].steps < 8


def test_what_is_remembered_of_sizes_is_bounded():
    known: dict = {}
    for size in range(KEPT + 5):
        _keep(known, (size,), size)
    assert list(known.values()) == list(range(5, KEPT + 5))

"""`enable_cache` on pipelines whose loops are not diffusers': what cannot be told apart is computed, and it is said."""

import gc
import threading
import warnings
import weakref

import pytest
import torch

import harmonica_dit
from harmonica_dit.pipelines.streams import Stream
from support.own_loops import OwnLoop, make_own
from support.trunk_by_hooks import trunk_by_hooks

SPEEDUP = 1.7


def with_cache(pipe, **call):
    """The output with a cache, and the summary."""
    harmonica_dit.enable_cache(pipe, SPEEDUP)
    try:
        return pipe(**call), harmonica_dit.summary(pipe)
    finally:
        harmonica_dit.disable_cache(pipe)


def by_hooks(pipe, calls, **call):
    """The output where every second of 8 steps is computed, each call of a step with states of its own."""
    with trunk_by_hooks(pipe.transformer, calls, 8, 4):
        return pipe(**call)


def check_computed(pipe, **call):
    """Nothing is reused, which is said: the output is the plain one to the bit."""
    plain = pipe(**call)
    with pytest.warns(UserWarning, match="the cache reused nothing in this call"):
        found, summary = with_cache(pipe, **call)
    assert torch.equal(found, plain) and summary.cur == 0
    return summary


def check_reused(pipe, calls=2, **call):
    """Each of a step's calls is reused from its own."""
    found, summary = with_cache(pipe, **call)
    torch.testing.assert_close(found, by_hooks(pipe, calls, **call))
    assert [stream.steps for stream in summary.streams] == [8] * calls and summary.cur == 0.5
    return summary


def test_an_own_loop():
    check_reused(make_own(OwnLoop))


@pytest.mark.parametrize("tiles", [2, 3, 9])
def test_calls_that_nothing_tells_apart(tiles):
    """Tiles of an image: each step calls the transformer for all of them, with one prompt. By their order alone they
    could be mixed up."""
    class Tiled(OwnLoop):
        prompts = 1

        def start(self, randn):
            return randn(tiles, 6, 4)

        def predict(self, x, t, i):
            return torch.cat([self.forward(tile, t, self.texts[0]) for tile in x.split(1)])

    summary = check_computed(make_own(Tiled))
    assert summary.streams[-1].fallbacks["nothing tells the calls of a step apart"] == 8 * tiles - 1


def test_caches_of_calls_that_turn_out_to_be_mixed_are_freed_at_once():
    class MixedLater(OwnLoop):
        """The first step has one call only."""
        prompts, kept = 1, []

        def predict(self, x, t, i):
            outputs = [self.forward(x, t, self.texts[0]) for _ in range(2 if i else 1)]
            self.kept.append(sum(one.cache.nbytes for one in gc.get_objects() if type(one) is Stream))
            return sum(outputs)

    _, summary = with_cache(make_own(MixedLater))
    assert MixedLater.kept[0] == summary.nbytes > 0 and not any(MixedLater.kept[1:])


def test_tiles_whose_order_changes_and_whose_other_arguments_are_new_at_each_call():
    class Shuffled(OwnLoop):
        prompts = 1

        def start(self, randn):
            return randn(3, 6, 4)

        def predict(self, x, t, i):
            out = torch.zeros_like(x)
            for tile in ([0, 1, 2], [2, 0], [1], [1, 2], [0], [2, 1, 0], [0, 1, 2], [1, 2])[i]:
                out[tile : tile + 1] = self.forward(x[tile : tile + 1], t, self.texts[0], guidance=torch.ones(1))
            return out

    check_computed(make_own(Shuffled))


@pytest.mark.parametrize("prompts", [8, 9])
def test_many_prompts(prompts):
    """As many as have a cache, and one more."""
    class Regions(OwnLoop):
        def predict(self, x, t, i):
            return sum(self.forward(x, t, text) for text in self.texts) / len(self.texts)

    Regions.prompts = prompts
    pipe = make_own(Regions)
    found, summary = with_cache(pipe)
    assert [stream.steps for stream in summary.streams] == [8] * prompts
    if prompts == 8:
        torch.testing.assert_close(found, by_hooks(pipe, 8))
    else:
        assert summary.streams[-1].fallbacks == {"there are more than 8 different calls": 8}
        assert summary.streams[-1].reused == 0 and summary.cur == pytest.approx(0.5 * 8 / 9)


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


@pytest.mark.parametrize("change", [lambda t: t.clone(), lambda t: t + 0.0, lambda t: t.view(t.shape)],
                         ids=["cloned", "computed", "viewed"])
def test_embeddings_made_anew_at_each_step(change):
    class Anew(OwnLoop):
        def predict(self, x, t, i):
            self.texts = [{name: change(value) for name, value in text.items()} for text in self.texts]
            return super().predict(x, t, i)

    check_reused(make_own(Anew))


def test_one_buffer_for_both_prompts():
    """Written over between the two calls."""
    class Buffer(OwnLoop):
        def predict(self, x, t, i):
            outputs, buffer = [], self.options["buffer"]
            for text in self.texts:
                for name, value in text.items():
                    buffer[name].copy_(value)
                outputs.append(self.forward(x, t, buffer))
            return outputs[0] + 2 * (outputs[1] - outputs[0])

    buffer = dict(encoder_hidden_states=torch.zeros(1, 3, 16), pooled_projections=torch.zeros(1, 12))
    check_computed(make_own(Buffer), buffer=buffer)
    with torch.inference_mode():  # where torch does not count what is written
        buffer = {name: torch.zeros_like(value) for name, value in buffer.items()}
        check_reused(make_own(Buffer), buffer=buffer)


@pytest.mark.parametrize("inference", [False, True])
def test_a_prompt_written_over_in_the_middle(inference):
    """What was computed with the old one is not reused."""
    class Edits(OwnLoop):
        def predict(self, x, t, i):
            if i == 3:  # which would be forecast
                self.texts[1]["encoder_hidden_states"].neg_()
                self.calls = len(self.blocks_run)
            return super().predict(x, t, i)

    pipe = make_own(Edits)
    pipe.blocks_run = []
    pipe.transformer.transformer_blocks[0].register_forward_hook(lambda *_: pipe.blocks_run.append(1))
    with torch.inference_mode(inference):
        _, summary = with_cache(pipe)
    first, second, third = summary.streams
    assert [stream.steps for stream in summary.streams] == [8, 3, 5]
    assert not first.fallbacks and dict(third.fallbacks) == {"there was nothing to reuse yet": 1}
    assert second.reused and third.reused


def test_conditioning_under_a_name_of_its_own():
    """Nothing but an argument that no other model has tells the two calls apart. Their order changes."""
    class Inside(type(make_own(OwnLoop).transformer)):
        def forward(self, hidden_states, timestep, mood, **others):
            return super().forward(hidden_states=hidden_states, timestep=timestep, encoder_hidden_states=mood, **others)

    class Moody(OwnLoop):
        def forward(self, x, t, text):
            return super().forward(x, t, dict(mood=text["encoder_hidden_states"], guidance=torch.ones(1),
                                              pooled_projections=self.texts[0]["pooled_projections"]))

        def predict(self, x, t, i):
            order = [1, 0] if i in self.options.get("swapped", ()) else [0, 1]
            outputs = {k: self.forward(x, t, self.texts[k]) for k in order}
            return outputs[0] + 2 * (outputs[1] - outputs[0])

    pipe = make_own(Moody)
    pipe.transformer.__class__ = Inside
    expected = by_hooks(pipe, 2)
    for swapped in ((), (1, 4, 5)):
        found, summary = with_cache(pipe, swapped=swapped)
        torch.testing.assert_close(found, expected)
        assert [stream.steps for stream in summary.streams] == [8, 8]


def test_a_control_net():
    """Its outputs are new at every call, and they are the present step's; where they end, another stream begins."""
    class Controlled(OwnLoop):
        def forward(self, x, t, text):
            controls = [x.repeat(1, 1, 8) * t / 1000] if t > self.options["until"] else None
            return super().forward(x, t, text, controlnet_block_samples=controls)

    pipe = make_own(Controlled)
    check_reused(pipe, until=0)
    _, summary = with_cache(pipe, until=600)
    assert [(stream.steps, sum(stream.fallbacks.values())) for stream in summary.streams] == [(5, 0)] * 2 + [(3, 1)] * 2


def test_a_transformer_that_names_no_arguments():
    class Passes(type(make_own(OwnLoop).transformer)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    pipe = make_own(OwnLoop)
    pipe.transformer.__class__ = Passes
    check_reused(pipe)


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

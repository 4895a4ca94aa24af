"""`enable_cache` where a step calls the transformer oddly: what cannot be told apart is computed, and it is said."""

import gc

import pytest
import torch

from harmonica_dit.pipelines.streams import Stream
from support.own_loops import OwnLoop, by_hooks, check_computed, check_reused, make_own, with_cache


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

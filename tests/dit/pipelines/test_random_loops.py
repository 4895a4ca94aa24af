"""Random loops around a linear model: what is reused or forecast for an image has to be made of that image alone."""

import random

import pytest
import torch
from torch import nn

import harmonica_dit

D, SEEDS = 12, 25  # images are multiples of one of D directions each; loops a test
pytestmark = pytest.mark.filterwarnings("ignore:pipe. the cache reused nothing", "ignore:reuses nothing",
                                        "ignore:forecasts to order 0", "ignore:pipe. this call returned before")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(D, D, bias=False))

    def forward(self, x):
        return x + self.ff(x)


class Linear(nn.Module):
    """Whose output for an image is that of any multiple of it, but for a factor. It fails on request."""

    fails = False

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList(Block() for _ in range(3)), nn.Linear(D, D, bias=False)
        for block in self.blocks:
            nn.init.orthogonal_(block.ff[0].weight)

    def forward(self, hidden_states, timestep=None, encoder_hidden_states=None, more=None):
        for block in self.blocks:
            if self.fails and block is self.blocks[1]:
                raise MemoryError
            hidden_states = block(hidden_states)
        return (self.head(hidden_states),)


class Scheduler:
    def set_timesteps(self, steps):
        self.timesteps, self.num_inference_steps = torch.linspace(1, 0.1, steps), steps

    def step(self, output, timestep, sample):
        return sample


class Pipe:
    """Calls what it is given."""

    def __init__(self):
        self.transformer, self.scheduler, self.config = Linear().requires_grad_(False), Scheduler(), {}

    @property
    def components(self):
        return dict(transformer=self.transformer)

    def __call__(self, loop):
        return loop(self)


PROMPTS = {"the same": lambda t, _: t, "viewed": lambda t, _: t.view(t.shape), "cloned": lambda t, _: t.clone(),
           "in one buffer": lambda t, buffer: buffer.copy_(t), "in a dict": lambda t, buffer: {"a": buffer.copy_(t)}}
MORE = {"nothing": lambda i: None, "the image's name": str, "a new tensor": lambda i: torch.randn(2),
        "a new tensor of the image": lambda i: torch.full((2,), float(i))}


class Loop:
    """Steps with calls for some of several images, in any order.

    Images that nothing tells apart are first called for in one step: of two that come one after the other nobody could
    know that they are two.
    """

    def __init__(self, rng: random.Random):
        self.rng, self.images = rng, range(rng.randint(1, 6))
        one_each = rng.random() < 0.6
        self.prompt_of = [i if one_each else rng.randrange(len(self.images)) for i in self.images]
        self.prompts = torch.randn(len(self.images), 1, 3, 4).unbind()
        self.give, self.more = rng.choice(list(PROMPTS.values())), rng.choice(list(MORE.values()))
        told = [(prompt, i if self.more is str else None) for i, prompt in enumerate(self.prompt_of)]
        self.groups = [[i for i in self.images if told[i] == one] for one in set(told)]

    def __call__(self, pipe):
        rng, seen, buffer = self.rng, set(), torch.zeros(1, 3, 4)
        steps = rng.randint(2, 12)
        pipe.scheduler.set_timesteps(steps)
        for s, t in enumerate(pipe.scheduler.timesteps):
            groups = [group for group in self.groups if s == 0 or rng.random() < 0.85]
            calls = [i for group in groups for i in group if not seen.issuperset(group) or rng.random() < 0.85]
            rng.shuffle(calls)
            seen |= set(calls)
            for i in calls:
                self.check_call(pipe, s, t, i, self.give(self.prompts[self.prompt_of[i]], buffer))
            for _ in range(rng.choice([0, 1, 1, 1, 1, 1, 1, 1, 1, 2])):
                pipe.scheduler.step(None, t, None)
            if rng.random() < 0.03:
                pipe.scheduler.set_timesteps(steps)
                seen.clear()

    def check_call(self, pipe, s, t, i, prompt):
        image, model = 10 * torch.eye(D)[i : i + 1], pipe.transformer
        call = dict(hidden_states=image * (1 + 0.3 * s), timestep=t, encoder_hidden_states=prompt, more=self.more(i))
        if self.rng.random() < 0.03:
            model.fails = True
            with pytest.raises(MemoryError):
                model(**call)
                raise MemoryError  # nothing was computed
            model.fails = False
        expected = image
        for block in model.blocks:
            expected = expected + expected @ block.ff[0].weight.T
        assert torch.cosine_similarity(model(**call)[0], expected @ model.head.weight.T).item() > 0.999, (s, i)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("first", range(0, 4 * SEEDS, SEEDS))
def test_random_loops(first, mode):
    reused = 0
    for seed in range(first, first + SEEDS):
        torch.manual_seed(seed)
        pipe, rng = Pipe(), random.Random(seed)
        pipe.scheduler.set_timesteps(2)
        with mode():
            harmonica_dit.enable_cache(pipe, rng.choice([1.2, 1.4]))
            for _ in range(2):
                pipe(Loop(rng))
                reused += sum(stream.reused for stream in harmonica_dit.summary(pipe).streams)
    assert reused > 100

"""Pipelines with a cache that share a transformer: by turns, one inside another, in threads."""

import threading

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline

import harmonica_dit
from harmonica_dit.pipelines import cached_pipeline
from harmonica_dit.pipelines.adapters.replace_forwards import dispatch_of
from support.enable_checks import run_with_hooks
from support.pipes import LINEAR, make_pipe, random_schedule, run, small_dit, small_pixart
from support.tolerance import assert_close


def test_the_transformer_used_inside_a_call(sigma):
    """From a callback, with other conditioning: it is computed, and the pipeline's own calls do not see it."""
    harmonica_dit.enable_cache(sigma, random_schedule(sigma.transformer))
    text, found = torch.randn(4, 9, 20), []
    expected = run(sigma)

    def arguments(latents, timestep):
        return dict(hidden_states=torch.cat([latents] * 2), encoder_hidden_states=text, timestep=timestep.expand(4))

    def callback(step, timestep, latents):
        if step == 2:
            given = arguments(latents, timestep)
            found.extend((given, sigma.transformer(**given).sample))

    assert torch.equal(run(sigma, callback=callback), expected)
    with torch.no_grad():
        assert_close(found[1], sigma.transformer(**found[0]).sample)


def test_pipelines_that_share_a_transformer():
    """Each with a schedule of its own, and one without."""
    transformer = small_pixart()
    pipes = [make_pipe("sigma", transformer=transformer) for _ in range(2)]
    pipes.append(PixArtAlphaPipeline.from_pipe(pipes[0]))
    pipes[2].set_progress_bar_config(disable=True)
    plain = run(pipes[2])
    schedules = [random_schedule(transformer, seed=seed) for seed in range(2)]
    expected = [run_with_hooks(pipe, schedule) for pipe, schedule in zip(pipes, schedules)]
    for pipe, schedule in zip(pipes, schedules):
        harmonica_dit.enable_cache(pipe, schedule)
    for _ in range(2):
        for pipe, image in zip(pipes, expected):
            assert_close(run(pipe), image)
        assert torch.equal(run(pipes[2]), plain)
    late = PixArtSigmaPipeline.from_pipe(pipes[0])
    late.set_progress_bar_config(disable=True)
    assert late.transformer is transformer and torch.equal(run(late), plain)
    harmonica_dit.disable_cache(pipes[0])
    assert torch.equal(run(pipes[0]), plain)
    assert_close(run(pipes[1]), expected[1])


def test_a_call_inside_a_call(sigma):
    """From a callback: of another pipeline with the same transformer, and of this one with a scheduler of its own."""
    other = make_pipe("sigma", transformer=sigma.transformer)
    schedules = [random_schedule(sigma.transformer, seed=seed) for seed in range(2)]
    harmonica_dit.enable_cache(sigma, schedules[0])
    harmonica_dit.enable_cache(other, schedules[1])
    expected, inner = run(sigma), run(other)
    found = []

    def callback(step, timestep, latents):
        if step == 2:
            found.append(run(other))

    assert torch.equal(run(sigma, callback=callback), expected)
    assert torch.equal(found[0], inner)
    harmonica_dit.disable_cache(sigma)
    sigma.scheduler = DDIMScheduler(**LINEAR)  # which keeps no history
    harmonica_dit.enable_cache(sigma, schedules[0])
    expected, inner = run(sigma), run(sigma, seed=3)
    found.clear()

    def callback_of_its_own(step, timestep, latents):
        if step == 2:
            found.append(run(sigma, seed=3))

    assert torch.equal(run(sigma, callback=callback_of_its_own), expected)
    assert torch.equal(found[0], inner)


def test_threads():
    """Pipelines with one transformer, and one pipeline with a scheduler that keeps no history, at the same time."""
    transformer = small_dit()
    pipes = [make_pipe("dit", transformer=transformer) for _ in range(3)]
    for seed, pipe in enumerate(pipes[:2]):
        harmonica_dit.enable_cache(pipe, random_schedule(transformer, 8, seed=seed))
    jobs = [(pipe, seed, images) for pipe in pipes for seed in range(2) for images in (1, 2)]
    expected = [run(pipe, 8, seed, images) for pipe, seed, images in jobs]
    found, start = [None] * len(jobs), threading.Barrier(len(jobs))

    def work(i):
        pipe, seed, images = jobs[i]
        start.wait()
        found[i] = run(pipe, 8, seed, images)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, image in zip(found, expected):
        assert torch.equal(got, image)
    assert dispatch_of(pipe.transformer) is None and not cached_pipeline._users

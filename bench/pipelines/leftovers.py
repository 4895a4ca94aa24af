"""Whether a call with a method on the pipeline depends on the calls before it."""

from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from bench.pipelines.checks import Interrupted, words

LEFTOVERS = ("second call", "after an interruption", "other steps")


def leftovers(make: Callable[[], DiffusionPipeline], run: Callable[..., Tensor], steps: int) -> dict[str, str]:
    """"right", "wrong" or the words of an error, for each kind of call.

    make: a pipeline with the method newly on it. run(pipe, steps): a call of it. A call is right that gives to the bit
    what it gives as the first one.
    """
    other = steps + 5

    def alone(number: int) -> Tensor:
        return run(make(), number)

    def second() -> bool:
        pipe = make()
        return torch.equal(run(pipe, steps), run(pipe, steps))

    def interrupted() -> bool:
        pipe = make()
        interrupt(pipe, run, steps)
        return torch.equal(run(pipe, steps), alone(steps))

    def others() -> bool:
        pipe = make()
        run(pipe, steps)
        return torch.equal(run(pipe, other), alone(other)) and torch.equal(run(pipe, steps), alone(steps))

    found = {}
    for name, check in zip(LEFTOVERS, (second, interrupted, others)):
        try:
            found[name] = "right" if check() else "wrong"
        except Exception as error:  # whatever their code raises is the finding
            found[name] = words(error)
    return found


def interrupt(pipe: DiffusionPipeline, run: Callable[..., Tensor], steps: int) -> None:
    """A call that an error ends before its fourth forward."""
    begun = []

    def stop(*_) -> None:
        begun.append(1)
        if len(begun) == 4:
            raise Interrupted

    handle = pipe.transformer.register_forward_pre_hook(stop)
    try:
        run(pipe, steps)
    except Interrupted:
        return
    finally:
        handle.remove()
    raise AssertionError("the call was not interrupted")

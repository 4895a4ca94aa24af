"""The cases of bench_all.py: what is compared with what. Candidates agree, or nothing is timed."""

import copy
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

from torch import Tensor, nn

from bench.pipelines.checks import words
from bench.replay import Measured
from bench.timing import quartiles, relative_error
from harmonica_dit.timing import interleave

PLAIN, COMPILED, OURS = "plain", "torch.compile", "ours"


class Candidate(NamedTuple):
    """One way of doing what the case does.

    call: does it, and returns a tensor or a sequence of them. times: how often `call` does it.
    like: the candidate of the same case that it must agree with, earlier in the order; None where it does something
        else and must be finite. near: up to so much, relative.
    rival: whether it is another's code, whose failure is a note in the table.
    """

    call: Callable[[], Tensor | Sequence[Tensor]]
    near: float = 1e-4
    like: str | None = PLAIN
    times: int = 1
    rival: bool = False


class Case(NamedTuple):
    """Candidates that are timed in the same rounds; the first one is plain PyTorch, the yardstick.

    names: of the candidates; "X: Y" is the way Y of doing a variant X. make(tiny): the candidates, by name.
    rounds: unless --rounds asks for others. full: whether only --full runs it.
    """

    name: str
    names: tuple[str, ...]
    make: Callable[[bool], Mapping[str, Candidate]]
    rounds: int
    full: bool = False


def measure(case: Case, tiny: bool, rounds: int, warmup: int) -> Measured:
    """Times the candidates after a call of each, which must agree with those that it should agree with.

    Raises:
        AssertionError: one of them does not, or fails; not of a rival.
    """
    made = case.make(tiny)
    if tuple(made) != case.names:
        raise AssertionError(f"{case.name}: made {list(made)}, expected {list(case.names)}")
    differences, notes = agree(made)
    seconds = {name: [value / made[name].times for value in values] for name, values in interleave(
        {name: made[name].call for name in differences}, rounds, warmup=warmup).items()}
    rows = {name: dict(what=case.name, candidate=name, note=notes.get(name)) for name in made}
    for name, values in seconds.items():
        low, middle, high = quartiles(values)
        rows[name] |= dict(ms=1e3 * middle, low_ms=1e3 * low, high_ms=1e3 * high, yardstick=PLAIN,
                           over_ours=ratio(values, seconds[ours_beside(name, seconds)]),
                           over_plain=ratio(values, seconds[PLAIN]), difference=differences[name],
                           like=made[name].like)
    return Measured(case.name, seconds, rows)


def agree(made: Mapping[str, Candidate]) -> tuple[dict[str, float], dict[str, str]]:
    """How much each candidate's result differs from the one that it must agree with; and why rivals cannot be timed."""
    results: dict[str, list[Tensor]] = {}
    differences: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, candidate in made.items():
        try:
            found = candidate.call()
            results[name] = [t.clone() for t in ([found] if isinstance(found, Tensor) else found)]
            wanted = results[name if candidate.like is None else candidate.like]
            pairs = zip(results[name], wanted, strict=True)
            difference = max((relative_error(a, b) for a, b in pairs), key=lambda error: (error != error, error))
            if not difference <= candidate.near:  # so that NaN is none
                raise AssertionError(f"differs from {candidate.like} by {difference:.2g}, expected at most "
                                     f"{candidate.near:g}")
        except Exception as error:  # whatever their code raises is the finding
            if not candidate.rival:
                raise AssertionError(f"{name}: {words(error)}") from error
            notes[name] = f"{name}: {words(error)}"
        else:
            differences[name] = difference
    return differences, notes


def ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return median(a / b for a, b in zip(values, base))


def ours_beside(name: str, names: Mapping[str, Any]) -> str:
    """Of our candidates the one that a candidate is to be compared with: of a variant's ways our way, else "ours"."""
    variant, _, way = name.rpartition(": ")
    of_variant = f"{variant}: {OURS}"
    return of_variant if way != OURS and of_variant in names else OURS


def shared_copy(module: nn.Module) -> nn.Module:
    """A module of the same weights."""
    return copy.deepcopy(module, {id(t): t for t in (*module.parameters(), *module.buffers())})


def compile_each(blocks: Sequence[nn.Module]) -> None:
    """Block by block, as diffusers' `compile_repeated_blocks` does: one compilation serves all of them."""
    for block in blocks:
        block.compile(fullgraph=True, dynamic=False)

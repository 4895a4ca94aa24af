"""The plan of a gated trajectory: which nodes the graph has, in which order, steered by which conditions.

Data alone. `on_cpu` runs it node by node, `on_cuda` makes it one graph; what either does is therefore what the plan
says.
"""

from dataclasses import dataclass

RULES = ("scores", "change")


@dataclass(frozen=True)
class Op:
    """Something that is computed; `branch` where it belongs to one, K for the final norm."""

    kind: str  # "modulation", "embed", "norm", "body", "head", "update"
    branch: int | None = None


@dataclass(frozen=True)
class Captured:
    """Ops recorded together through PyTorch: a child graph."""

    name: str
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Rewind:
    """Puts the step counter before the first step."""

    name: str = "rewind"


@dataclass(frozen=True)
class Decide:
    """Decides the branches first..last-1 of a step and writes their conditions; with first = 0 also goes on to the next
    step and writes the loop's condition. rule: see `DecisionRule` in csrc/kernels.h."""

    first: int
    last: int
    rule: str

    @property
    def name(self) -> str:
        return f"decision on branches {self.first} to {self.last - 1}"


@dataclass(frozen=True)
class Change:
    """How far branch 0's output is from its reference."""

    name: str = "change of branch 0"


@dataclass(frozen=True)
class If:
    """Runs its body where the branch is computed at this step."""

    branch: int
    body: tuple["Node", ...]

    @property
    def name(self) -> str:
        return f"IF of branch {self.branch}"


@dataclass(frozen=True)
class While:
    """Runs its body as long as a step follows; tested before the first time too."""

    body: tuple["Node", ...]
    name: str = "WHILE over the steps"


Node = Captured | Rewind | Decide | Change | If | While


def plan(branches: int, rule: str = "scores") -> tuple[Node, ...]:
    """The nodes of a trajectory of any number of steps, each to run after the one before it.

    The norm before branch k adds the run since the branch that was computed last, wherever in the model that is: a run
    of reused branches is one pass, and what stands outside the IF nodes is what every step has. Nothing depends on
    scores, threshold or extrapolation, so none of them changes the plan.

    Args:
        branches: K.
        rule: "scores", or "change": branch 0 is computed at every step, and the others are where its output has
            changed by more than the threshold, relative to the output that was last followed by computed ones.

    Raises:
        ValueError: an argument is out of range.
    """
    K = branches
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(map(repr, RULES))}")
    least = 2 if rule == "change" else 1
    if K < least:
        raise ValueError(f"branches: got {K}, the rule {rule!r} needs at least {least}")
    ifs = [If(k, (Captured(f"branch {k}", (Op("norm", k), Op("body", k))),)) for k in range(K)]
    embed = Captured("embedding", (Op("embed"),))
    if rule == "scores":
        decided = [Decide(0, K, "scores"), embed, *ifs]
    else:
        decided = [Decide(0, 1, "always"), embed, ifs[0], Change(), Decide(1, K, "change"), *ifs[1:]]
    step = (*decided, Captured("head", (Op("norm", K), Op("head"), Op("update"))))
    return Captured("modulation", (Op("modulation"),)), Rewind(), While(step)

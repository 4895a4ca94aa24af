"""The plan of a gated trajectory: the nodes of its graph, their order, and the conditions that steer them.

The plan is data. `on_cpu` runs it node by node and `on_cuda` makes it one graph, so both do what the plan says.
"""

from dataclasses import dataclass

RULES = ("scores", "change")


@dataclass(frozen=True)
class Op:
    """One computation. branch: the branch that it belongs to, K for the final norm, None if it belongs to none."""

    kind: str  # "modulation", "embed", "norm", "body", "trunk", "weigh", "head", "update"
    branch: int | None = None


@dataclass(frozen=True)
class Capture:
    """Ops that PyTorch records together, as one child graph."""

    name: str
    ops: tuple[Op, ...]


@dataclass(frozen=True)
class Rewind:
    """Puts the step counter before the first step."""

    name: str = "rewind"


@dataclass(frozen=True)
class Decide:
    """Decides the branches first..last-1 of a step and writes their conditions. With first = 0 it first goes on to the
    next step and also writes the loop's condition. rule: see `DecisionRule` in csrc/kernels.h."""

    first: int
    last: int
    rule: str

    @property
    def name(self) -> str:
        return f"decision on branches {self.first} to {self.last - 1}"


@dataclass(frozen=True)
class Change:
    """Measures how far branch 0's output is from its reference."""

    name: str = "change of branch 0"


@dataclass(frozen=True)
class If:
    """Runs its body if the branch is computed at this step."""

    branch: int
    body: tuple["Node", ...]

    @property
    def name(self) -> str:
        return f"IF of branch {self.branch}"


@dataclass(frozen=True)
class While:
    """Runs its body as long as another step follows; the condition is tested before the first step too."""

    body: tuple["Node", ...]
    name: str = "WHILE over the steps"


Node = Capture | Rewind | Decide | Change | If | While


def plan(branches: int, rule: str = "scores", unit: str = "branch") -> tuple[Node, ...]:
    """The nodes of a trajectory of any number of steps. Each node runs after the one before it.

    The norm before branch k adds the run that begins at the branch computed last in this step, so any number of reused
    branches costs one pass and no node of its own. Nodes outside the IF nodes run at every step. Scores, threshold and
    extrapolation do not change the plan.

    Args:
        branches: K.
        rule: "scores", or "change": branch 0 is computed at every step. The others are computed if its output has
            changed, since the last step that computed them, by more than the threshold relative to its size.
        unit: what is decided: "branch", or "trunk": all branches together. Then every step weighs the trunk's cached
            states before the head.

    Raises:
        ValueError: an argument is out of range.
    """
    K = branches
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected one of {', '.join(map(repr, RULES))}")
    embed = Capture("embedding", (Op("embed"),))
    if unit == "trunk":
        if rule != "scores":
            raise ValueError(f"rule: got {rule!r}; a forecast of the trunk follows its schedule, rule=\"scores\"")
        whole = If(0, (Capture("trunk", (Op("trunk"),)),))
        weighed = Capture("head", (Op("weigh"), Op("head"), Op("update")))
        return _trajectory((Decide(0, 1, "scores"), embed, whole, weighed))
    least = 2 if rule == "change" else 1
    if K < least:
        raise ValueError(f"branches: got {K}, the rule {rule!r} needs at least {least}")
    ifs = [If(k, (Capture(f"branch {k}", (Op("norm", k), Op("body", k))),)) for k in range(K)]
    if rule == "scores":
        decided = [Decide(0, K, "scores"), embed, *ifs]
    else:
        decided = [Decide(0, 1, "always"), embed, ifs[0], Change(), Decide(1, K, "change"), *ifs[1:]]
    return _trajectory((*decided, Capture("head", (Op("norm", K), Op("head"), Op("update")))))


def _trajectory(step: tuple[Node, ...]) -> tuple[Node, ...]:
    return Capture("modulation", (Op("modulation"),)), Rewind(), While(step)

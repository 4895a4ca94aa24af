"""The plan, walked on the CPU with what decides in C++, against trajectories step by step through `cached_forward`."""

import random
from dataclasses import replace

import pytest
import torch

import harmonica_kernels as hk
from harmonica_kernels.graphs.gated.decision_memory import DecisionMemory
from harmonica_kernels.graphs.gated.norm import is_aligned, norm_on_cpu
from harmonica_kernels.graphs.gated.parts import Parts
from harmonica_kernels.graphs.gated.plan import Capture, Change, Decide, If, Op, Rewind, While, plan
from harmonica_kernels.ops import residual_norm
from support.loops import Table, Trajectory, compile_gated


def random_table(T, K, forecast):
    """Scores of any density, among them rows that compute everything or nothing."""
    scores = torch.rand(T, K) ** random.choice((0.3, 1, 3))
    for s in range(1, T):
        if random.random() < 0.3:
            scores[s] = random.choice((0.0, 1.0))
    coefficients = torch.randn(T, K) * (torch.rand(T, K) < 0.7) if forecast else None
    return Table(scores, coefficients)


def run_step_by_step(trajectory, noise, table, threshold):
    compute, weights = table.rows(threshold)
    image = trajectory.run(noise, lambda s, tokens, rows: (tuple(compute[s].tolist()), weights[s]))
    return image, compute


@pytest.mark.parametrize("part", range(8))
def test_equals_cached_forward_on_random_schedules(part):
    """2,000 schedules: with and without forecasts, each at its own threshold, on one executor for each model."""
    for _ in range(25):
        T, K = random.randint(1, 6), random.randint(1, 7)
        trajectory = Trajectory(T, K, n=random.randint(1, 2), tokens=random.randint(1, 3))
        executor = compile_gated()
        for i in range(10):
            table = random_table(T, K, forecast=i % 2 == 1)
            executor.load(table)
            executor.threshold = threshold = random.choice((0.1, random.random()))
            noise = torch.randn(trajectory.shape)
            image, compute = run_step_by_step(trajectory, noise, table, threshold)
            torch.testing.assert_close(executor(trajectory, noise), image, rtol=0, atol=0)
            assert torch.equal(executor.reused, ~compute)
        assert executor.graphs == 1


def test_bfloat16_bodies():
    for _ in range(20):
        trajectory = Trajectory(4, 5, dtype=torch.bfloat16)
        table, noise = random_table(4, 5, True), torch.randn(trajectory.shape)
        executor = compile_gated()
        executor.load(table)
        expected, _ = run_step_by_step(trajectory, noise, table, 0.1)
        torch.testing.assert_close(executor(trajectory, noise), expected, rtol=0, atol=0)


def test_a_changed_router_threshold_or_label_equals_a_fresh_executor_to_the_bit():
    trajectory = Trajectory(5, 6)
    used = compile_gated()
    for i in range(40):
        table, threshold = random_table(5, 6, forecast=i > 20), random.random()
        trajectory.labels = torch.randint(7, (2,))
        noise = torch.randn(trajectory.shape)
        fresh = compile_gated()
        for executor in (used, fresh):
            executor.load(table)
            executor.threshold = threshold
        assert torch.equal(used(trajectory, noise), fresh(trajectory, noise))
        assert torch.equal(used.reused, fresh.reused)
    assert used.graphs == 1


def test_threshold_decides_in_double_precision():
    """In float32, 0.1 is not above 0.1; as a Python float, float32's 0.1 is above 0.1, as everywhere else here."""
    trajectory, executor = Trajectory(2, 1), compile_gated()
    executor.load(Table(torch.full((2, 1), 0.1)))
    for threshold, reused in ((0.1, False), (float(torch.tensor(0.1)), True)):
        executor.threshold = threshold
        executor(trajectory, torch.randn(trajectory.shape))
        assert executor.reused[1].item() is reused


def first_output(trajectory, tokens, rows):
    """Branch 0's output for a step's tokens."""
    branch = trajectory.branches[0]
    h = residual_norm(tokens, [], rows.shift[0], rows.scale[0], norm=branch.norm, eps=branch.eps)
    return branch.body(h, 0.01)


class ByDefinition:
    """The change rule by its definition, step by step."""

    def __init__(self, trajectory, threshold, coefficients):
        self.trajectory, self.threshold, self.coefficients = trajectory, threshold, coefficients
        self.reference, self.rows = None, []

    def __call__(self, s, tokens, modulation):
        o = first_output(self.trajectory, tokens, modulation).double()
        moved = s == 0 or (o - self.reference).abs().sum() > self.threshold * self.reference.abs().sum()
        if moved:
            self.reference = o
        self.rows.append((True, *[bool(moved)] * (self.trajectory.K - 1)))
        known = None if self.coefficients is None else self.coefficients[:s + 1]
        return self.rows[-1], Table(torch.tensor(self.rows).float(), known).rows(0.5)[1][s]


def test_change_rule_decides_as_its_definition():
    """Branch 0 always; the others where |o - reference| exceeds τ·|reference|, o being the reference from then on."""
    decisions = set()
    for _ in range(150):
        T, K = random.randint(1, 7), random.randint(2, 6)
        trajectory, executor = Trajectory(T, K), compile_gated("change")
        coefficients = random.choice((None, torch.randn(T, K)))
        executor.load(Table(torch.rand(T, K), coefficients))
        executor.threshold = random.random() * 0.6
        decide, noise = ByDefinition(trajectory, executor.threshold, coefficients), torch.randn(trajectory.shape)
        image = trajectory.run(noise, decide)
        torch.testing.assert_close(executor(trajectory, noise), image, rtol=0, atol=0)
        assert torch.equal(executor.reused, ~torch.tensor(decide.rows))
        decisions |= {row[1] for row in decide.rows[1:]}
    assert decisions == {True, False}


def test_plan_of_a_router():
    branch = [If(k, (Capture(f"branch {k}", (Op("norm", k), Op("body", k))),)) for k in range(3)]
    head = Capture("head", (Op("norm", 3), Op("head"), Op("update")))
    assert plan(3) == (
        Capture("modulation", (Op("modulation"),)), Rewind(),
        While((Decide(0, 3, "scores"), Capture("embedding", (Op("embed"),)), *branch, head)))
    loop = plan(3, "change")[-1]
    assert [type(node) for node in loop.body] == [Decide, Capture, If, Change, Decide, If, If, Capture]
    assert loop.body[4] == Decide(1, 3, "change")


@pytest.mark.parametrize("rule", ["scores", "change"])
def test_a_plan_is_a_value(rule):
    assert len({plan(3, rule), plan(3, rule), plan(4, rule)}) == 2


@pytest.mark.parametrize("rule", ["scores", "change"])
def test_every_condition_is_written_once_a_step_and_before_it_is_read(rule):
    body = plan(9, rule)[-1].body
    written = []
    for node in body:
        if isinstance(node, Decide):
            written += range(node.first, node.last)
        if isinstance(node, If):
            assert node.branch in written
            assert all(not isinstance(inner, (Decide, If, While)) for inner in node.body)
    assert written == list(range(9))


def test_tf32_is_another_graph():
    trajectory, executor = Trajectory(2, 2), hk.compile(Trajectory.run, mode="gated")
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            executor(trajectory, torch.randn(trajectory.shape))
    finally:
        torch.set_float32_matmul_precision(before)
    assert executor.graphs == 2


def test_the_least_recently_used_graph_goes_first():
    executor = hk.compile(Trajectory.run, mode="gated", graphs=2)
    one, two, three = (Trajectory(2, 2) for _ in range(3))
    for trajectory in (one, two, one, three):
        executor(trajectory, torch.randn(trajectory.shape))
    assert [key[0][-1] for key in executor._loops] == [one, three]


def test_the_decisions_of_a_graph_that_is_gone_are_not_read():
    executor = hk.compile(Trajectory.run, mode="gated", rule="change", graphs=1)
    trajectory, refused = Trajectory(2, 2), Trajectory(2, 1)
    executor(trajectory, torch.randn(trajectory.shape))
    with pytest.raises(ValueError, match="at least 2"):
        executor(refused, torch.randn(refused.shape))  # after it has made room
    with pytest.raises(RuntimeError, match="nothing has run yet"):
        _ = executor.reused


def test_refusals():
    executor = compile_gated()
    trajectory = Trajectory(3, 4)
    noise = torch.randn(trajectory.shape)
    with pytest.raises(RuntimeError, match="nothing has run yet"):
        _ = executor.reused
    executor.load(Table(torch.rand(4, 4)))
    with pytest.raises(ValueError, match=r"router: is for \[4, 4\].*trajectory has \[3, 4\]"):
        executor(trajectory, noise)
    with pytest.raises(ValueError, match="threshold: got -1"):
        executor.threshold = -1
    with pytest.raises(ValueError, match="float32"):
        executor.load(Table(torch.rand(3, 4).double()))
    with pytest.raises(ValueError, match="rule: got 'first'"):
        compile_gated("first")
    with pytest.raises(ValueError, match="at least 2"):
        compile_gated("change")(Trajectory(2, 1), noise)
    executor.load(Table(torch.rand(3, 4)))
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast"):
        executor(trajectory, noise)


@pytest.mark.parametrize("width, tokens, first, aligned", [(32, 3, 32, True), (24, 16, 32, False), (32, 16, 33, False)])
def test_the_norm_is_promised_multiples_of_16_only_where_all_are(width, tokens, first, aligned):
    """`first`: where the second branch's gate rows begin, counted from the first's."""
    trajectory = Trajectory(2, 2, tokens=tokens, width=width, plain=True)
    loop = trajectory.loop()
    wide = torch.zeros(2, trajectory.B, 80)
    mod = loop.modulation()._replace(gate=[wide[..., :width], wide[..., first:first + width]])
    loop = replace(loop, modulation=lambda: mod)
    memory = DecisionMemory(2, 2, 1, torch.device("cpu"))
    assert is_aligned(Parts(loop, memory, torch.randn(trajectory.shape), norm_on_cpu)) is aligned


def test_an_output_that_does_not_begin_at_a_vector_is_copied():
    """The norm on CUDA reads whole vectors of 64 bytes."""
    trajectory = Trajectory(2, 1, plain=True)

    def body(h, context):
        memory = torch.zeros(h.numel() + 16)
        begin = next(i for i in range(16) if memory[i:].data_ptr() % 64 == 4)
        return memory[begin : begin + h.numel()].view(h.shape).copy_(h.sin())

    loop = replace(trajectory.loop(), branches=[hk.Branch(body)])
    parts = Parts(loop, DecisionMemory(2, 1, 1, torch.device("cpu")), torch.randn(trajectory.shape), norm_on_cpu)
    parts.h.copy_(torch.randn(parts.h.shape))
    parts.run(Op("body", 0))
    assert parts.fresh[0].data_ptr() % 64 == 0 and torch.equal(parts.fresh[0], parts.h.sin())


def rows(part, k, change):
    """The modulation of a loop with one row of one part changed."""
    def changed(loop):
        mod = loop.modulation()
        found = list(getattr(mod, part))
        found[k] = change(found[k])
        return dict(modulation=lambda: mod._replace(**{part: found}))
    return changed


def branch(k, **change):
    return lambda loop: dict(branches=[replace(b, **change) if j == k else b for j, b in enumerate(loop.branches)])


@pytest.mark.parametrize("error, message, change", [
    (ValueError, r"updates: got shape \(2, 2\), expected \[3, 2\]", lambda loop: dict(updates=loop.updates[:2])),
    (ValueError, r"updates: got shape \(3, 1\)", lambda loop: dict(updates=loop.updates[:, :1])),
    (ValueError, "embed: returned . rows for 2 samples", lambda loop: dict(embed=lambda x: loop.embed(x)[:1])),
    (ValueError, "got 4 entries in scale, expected 5",
     lambda loop: dict(modulation=lambda: loop.modulation()._replace(scale=loop.modulation().scale[1:]))),
    (ValueError, "branch 1 says gate=True", rows("gate", 1, lambda row: None)),
    (ValueError, "branch 1 says gate=False", branch(1, gate=False)),
    (TypeError, r"shift\[2\] is torch.float64, expected one dtype", rows("shift", 2, lambda row: row.double())),
    (ValueError, r"shift\[4\] has shape \(2, ", rows("shift", 4, lambda row: row[:2])),
    (ValueError, r"gate\[0\] has shape \(3, ., 15\)", rows("gate", 0, lambda row: row[..., :15])),
    (ValueError, r"branches\[1\].body: returned torch.float64 of shape",
     branch(1, body=lambda h, context: h.double(), body_out=None)),
    (ValueError, r"branches\[3\].body: returned torch.float32 of shape \(., 1, 16\)",
     branch(3, body=lambda h, context: h[:, :1], body_out=None)),
])
def test_a_loop_that_contradicts_itself_is_refused(error, message, change):
    trajectory = Trajectory(3, 4, plain=True)
    loop = trajectory.loop()
    trajectory.loop = lambda: replace(loop, **change(loop))
    with pytest.raises(error, match=message):
        compile_gated()(trajectory, torch.randn(trajectory.shape))

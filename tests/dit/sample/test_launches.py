"""How many kernels a step of DiT-XL/2 launches on a GPU, by executor: its depth, but narrow, counted on the CPU."""

import pytest
import torch

import harmonica_kernels as hk
from harmonica_dit.methods import trunk_forecast
from harmonica_dit.models import DiT
from harmonica_dit.sample import Trajectory, denoise
from harmonica_kernels.graphs.gated.decision_memory import DecisionMemory
from harmonica_kernels.graphs.gated.parts import Parts
from harmonica_kernels.graphs.gated.plan import Capture, If, While, plan
from harmonica_kernels.graphs.gated.trunk_parts import TrunkParts
from support.cpu_recorder import CpuRecorder
from support.launches import Launches, as_on_a_gpu, one_launch

DEPTH, T = 28, 20
K = 2 * DEPTH
ALL, NOTHING, HALF = (True,) * K, (False,) * K, (True, False) * DEPTH


@pytest.fixture
def trajectory(monkeypatch):
    as_on_a_gpu(monkeypatch)
    net = DiT(input_size=4, hidden_size=16, depth=DEPTH, num_heads=2).eval().requires_grad_(False).to(torch.bfloat16)
    for block in net.blocks:
        block.attn.back_end = one_launch
    return Trajectory(net, torch.tensor([7]), steps=T)


@pytest.fixture
def step(trajectory):
    """step(row, **options): what the step after a computed one launches, with what is computed ahead of it."""
    x = torch.randn(1, *trajectory.net.sample_shape)

    def run(row, cache, **options):
        ahead = list(trajectory.hoist([None, row]))
        trajectory.step(x, 0, row=None, cache=cache, **ahead[0])
        with Launches() as launches:
            trajectory.step(x, 1, row=row, cache=cache, **options, **ahead[1])
        return launches

    with torch.no_grad():
        yield run


def test_a_captured_step(step):
    """A block: two norms, and the five kernels of its bodies."""
    everything, nothing = step(ALL, hk.FeatureCache()), step(NOTHING, hk.FeatureCache())
    assert nothing.count == 8 and nothing.found["residual_norm"] == 1, nothing.found
    assert everything.count == 7 * DEPTH + nothing.count, everything.found
    weights = hk.TrunkWeights(torch.ones(1, 16))
    forecast = step(False, hk.TrunkCache(), forecast_weights=weights)
    assert forecast.count == 8 and forecast.found["residual_norm"] == 1, forecast.found


def test_tokens_are_copied_once_where_a_convolution_made_them(trajectory):
    """Another model's; `cached_forward` reads them in two passes."""
    net, cache = trajectory.net, hk.FeatureCache()
    x, rows = torch.randn(1, 16, 4).transpose(1, 2).to(torch.bfloat16), torch.zeros(1, 16, dtype=torch.bfloat16)
    with torch.no_grad(), Launches() as launches:
        hk.cached_forward(net.branches, x, hk.Modulation(*[[rows] * (K + 1)] * 2, [rows] * K), cache=cache)
    assert launches.found["clone"] == 1


@torch.no_grad()
@pytest.mark.parametrize("rows", [[None] * T, [ALL] + [HALF] * 19, [ALL] + [NOTHING] * 19],
                         ids=["all", "half", "nothing"])
def test_the_modulation_of_all_steps_is_a_product_a_block(trajectory, rows):
    with Launches() as launches:
        assert len(list(trajectory.hoist(rows))) == T
    assert launches.count == DEPTH + 18, launches.found


@torch.no_grad()
def test_a_gated_step(trajectory):
    """Beside the decision's kernel, and without the nodes that ask for a condition. Its norms are a launch each."""
    def counted(parts, nodes, found):
        for node in nodes:
            if isinstance(node, (If, While)):
                counted(parts, node.body, found)
            elif isinstance(node, Capture):
                with Launches() as launches:
                    for op in node.ops:
                        parts.run(op)
                found[node.name] = launches.count
        return found

    noise = torch.randn(1, *trajectory.net.sample_shape)
    memory = DecisionMemory(T, K, 1, noise.device)
    parts = Parts(trajectory.loop(), memory, noise, lambda parts, k: parts.h.zero_())
    found = counted(parts, plan(K), {})
    assert all(found[f"branch {k}"] + found[f"branch {k + 1}"] == 7 for k in range(0, K, 2))
    assert found["embedding"] + found["head"] == 8

    trunk = TrunkParts(trajectory.loop(), DecisionMemory(T, 1, 1, noise.device), noise, 2)
    memory.step.zero_()
    found = counted(trunk, plan(1, unit="trunk"), {})
    assert found["embedding"] + found["head"] == 10 and found["trunk"] == 7 * DEPTH + 5, found


@torch.no_grad()
def test_a_trajectory_of_whole_steps_is_one_graph(trajectory, monkeypatch):
    """And another schedule is another one."""
    CpuRecorder.install(monkeypatch)
    executor, noise = hk.compile(denoise), torch.randn(1, *trajectory.net.sample_shape).to(torch.bfloat16)
    for count, every in ((1, 2), (2, 3)):
        whole = trunk_forecast(trajectory.net, T, every=every)
        images = [executor(trajectory, noise, whole) for _ in range(3)]  # runs, records, replays
        assert executor.graphs == count and torch.equal(images[0], images[2])

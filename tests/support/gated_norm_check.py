"""The norm that finds its run on the device, against the one that is told it, on random states of what decides.

`TRITON_INTERPRET=1 python -m support.gated_norm_check 100` in tests/ runs it in Triton's interpreter (a process of its
own, for Triton reads the variable when it is imported), `python -m support.gated_norm_check 100 cuda` on a GPU.
"""

import random
import sys

import torch

from harmonica_kernels.graphs.gated.decision_memory import DecisionMemory
from harmonica_kernels.graphs.gated.norm import norm_on_cpu, norm_on_cuda, point
from harmonica_kernels.graphs.gated.parts import Parts
from harmonica_kernels.ops._library import kernels
from support.loops import Trajectory

WIDTHS = (6, 8, 16, 24, 96, 130)  # two values can be so near to each other that their norm is mostly rounding


def random_memory(steps: int, branches: int, history: int) -> tuple[DecisionMemory, int]:
    """The memory after a random number of steps of random decisions; and k, a branch computed there or K."""
    memory = DecisionMemory(steps, branches, history, torch.device("cpu"), parts=1)
    memory.scores.copy_(torch.rand(steps, branches))
    memory.extrapolation.copy_(torch.randn(steps, branches) * (torch.rand(steps, branches) < 0.7))
    memory.threshold.fill_(random.choice((0.3, 0.7, 0.95)))
    memory.step.fill_(-1)
    for _ in range(random.randint(1, steps)):
        kernels.decide(memory.addresses(), 0, branches, "scores")
    return memory, random.choice([*memory.compute.nonzero().flatten().tolist(), branches])


def copy_to(device: torch.device, memory: DecisionMemory) -> DecisionMemory:
    moved = DecisionMemory(memory.steps, memory.branches, memory.history, device, memory.parts)
    for name, value in vars(memory).items():
        if isinstance(value, torch.Tensor):
            getattr(moved, name).copy_(value)
    return moved


def check(device: torch.device) -> None:
    """One random problem; the kernel of `device` has to agree with the op on the CPU."""
    T, K = random.randint(1, 5), random.randint(1, 11)
    dtype = random.choice((torch.float32, torch.bfloat16, torch.float16))
    memory, k = random_memory(T, K, random.choice((1, 2)))
    trajectory = Trajectory(T, K, tokens=random.randint(1, 3), width=random.choice(WIDTHS), dtype=dtype)
    expected = Parts(trajectory.loop(), memory, torch.randn(trajectory.shape), norm_on_cpu)
    for buffer in (expected.x, expected.tokens, expected.arena):
        buffer.copy_(torch.randn(buffer.shape))
    start = int(memory.start[k])
    fresh = [torch.randn(expected.arena.shape[2:]).to(dtype) for _ in range(K)]
    in_slot = memory.history == 1 and random.random() < 0.5
    if in_slot:
        fresh[start % K] = expected.arena[0, start % K]
    expected.fresh = fresh

    found = Parts(trajectory.to(device).loop(), copy_to(device, memory), torch.randn(trajectory.shape).to(device),
                  norm_on_cuda)
    for name in ("x", "tokens", "arena"):
        getattr(found, name).copy_(getattr(expected, name))
    outputs = [t.to(device) for t in fresh]
    if in_slot:
        outputs[start % K] = found.arena[0, start % K]
    point(found, [t.data_ptr() for t in outputs])

    norm_on_cuda(found, k)
    norm_on_cpu(expected, k)
    tolerance = dict(rtol=4 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    torch.testing.assert_close(found.arena.cpu(), expected.arena, rtol=0, atol=0)
    if k < K:
        torch.testing.assert_close(found.x.cpu(), expected.x, **tolerance)
    if expected.needs_h(k):
        torch.testing.assert_close(found.h.cpu(), expected.h, **tolerance)


def main() -> None:
    seed = random.SystemRandom().randrange(1 << 31)
    for i in range(int(sys.argv[1])):
        random.seed(seed + i)
        torch.manual_seed(seed + i)
        try:
            check(torch.device(sys.argv[2] if len(sys.argv) > 2 else "cpu"))
        except BaseException:
            print(f"problem {i} of seed {seed}", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()

"""Executors: what a function launches on the GPU, recorded once and replayed without Python.

    captured.py    a graph for each distinct call
    gated/         one graph for a whole trajectory whose steps are decided on the device
    recording.py   recording through PyTorch, such that a failed recording leaves the device usable
    keys.py        what tells one recorded call from another
"""

from collections.abc import Callable

from torch import Tensor

from .captured import Captured
from .gated import Gated

__all__ = ["Captured", "Gated", "compile"]


def compile(function: Callable[..., Tensor | tuple[Tensor, ...]], *, mode: str = "captured",
            rule: str = "scores", graphs: int = 64) -> Captured | Gated:
    """An executor of `function`: called like it, with the same results, but without its Python where there is a GPU.

    With tensors on a GPU, a call that comes a second time is recorded as a CUDA graph and replayed from then on; the
    first runs as it is, which also warms up what must not happen in a recording (compiling, tuning, planning). With
    tensors on the CPU, every call runs as it is.

    Any function of tensors will do: a denoiser's forward (a graph for each row of a schedule), or a whole trajectory
    with the scheduler's steps in it (one graph for a schedule: the fastest, since one launch is all that is left).

    Its arguments, by position or name, are of these kinds:
        tensors: the graph's inputs, copied into buffers of its own. Another shape or dtype is another graph.
        a FeatureCache: read and renewed in place, so it is to be used for trajectory after trajectory: `rewind` between
            them keeps its memory, which the graph has written down. Until it has memory, calls with it run as they are.
        an object with `graph_parts()`, which returns (key, tensors, rebuild): the hashable rest that decides what it
            does, the tensors that it holds, and a function from such tensors to the same object holding those.
        all else has to be hashable (a row: a tuple of bools; a list counts as a tuple) and is a constant of the graph.
            For modules and schedules that means the very object; weights may change in place, and a module whose
            weights were moved or cast is recorded anew.

    Args:
        function: returns a tensor or a tuple of tensors; its only side effects may be those on its caches.
        mode: "captured", or "gated": decided on the device. Then `function(trajectory, noise, schedule)` is a whole
            trajectory (`harmonica_dit.denoise`), and the executor a `harmonica_kernels.graphs.Gated`: one graph serves
            every router, schedule and threshold, and changing them is a memory write.
        rule: of "gated", what decides: "scores" (of a router or schedule), or "change", a test of how far the first
            branch's output has moved.
        graphs: how many are kept alive; the one longest unused goes first. They share one pool of memory, which is
            returned when the last of them goes.

    Returns:
        The executor. Its results are the caller's own. It is not for two threads or streams at once.

    Raises:
        ValueError: an argument is out of range.
        When called: RuntimeError with grad enabled, or where the function cannot be captured, since it waits for the
        GPU, copies from the host or draws random numbers (torch.OutOfMemoryError where memory is short); TypeError or
        ValueError for arguments of other kinds or on several devices. The message says what to do.
    """
    if mode not in ("captured", "gated"):
        raise ValueError(f'mode: got {mode!r}, expected "captured" or "gated"')
    if not callable(function):
        raise TypeError(f"function: got {type(function).__name__}, expected something to call")
    if isinstance(graphs, bool) or not isinstance(graphs, int) or graphs < 1:
        raise ValueError(f"graphs: got {graphs!r}, expected a whole number ≥ 1")
    if mode == "gated":
        return Gated(function, rule, graphs)
    return Captured(function, graphs)

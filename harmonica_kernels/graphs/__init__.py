"""Executors: they record once what a function launches on the GPU, and replay it without Python.

    captured.py    a graph for each distinct call
    gated/         one graph for a whole trajectory whose steps the device decides
    recording.py   recording through PyTorch; a failed recording leaves the device usable
    keys.py        the key of a recorded call
    weights.py     whether a module's weights are still those of the recording
"""

from collections.abc import Callable

from torch import Tensor

from .captured import Captured
from .gated import Gated

__all__ = ["Captured", "Gated", "compile"]


def compile(function: Callable[..., Tensor | tuple[Tensor, ...]], *, mode: str = "captured",
            rule: str = "scores", graphs: int = 64) -> Captured | Gated:
    """An executor of `function`: called like it, with the same results, but on a GPU without its Python.

    With tensors on a GPU, the first call runs as it is; compiling, tuning and planning, which must not happen in a
    recording, happen there. The second equal call is recorded as a CUDA graph, and later ones replay the graph. With
    tensors on the CPU, every call runs as it is.

    `function` may be any function of tensors: a denoiser's forward (one graph for each row of a schedule), or a whole
    trajectory with the scheduler's steps (one graph for a schedule; the fastest, since one launch is all that is left).

    Its arguments, by position or name, may be
        tensors: the graph's inputs, copied into its own buffers. Another shape or dtype makes another graph.
        FeatureCaches: read and renewed in place. The graph holds the addresses of a cache's memory, so use one cache
            for trajectory after trajectory and `rewind` it between them, which keeps the memory. Calls with a cache
            that has no memory yet run as they are.
        objects with `graph_parts()`, which returns (key, tensors, rebuild): `tensors` are those that the object holds,
            `key` is hashable and says everything else that decides what the object does, and `rebuild(*tensors)`
            returns the same object with other tensors in their places.
        anything else that can be hashed (a row: a tuple of bools; a list counts as a tuple): a constant of the graph.
            Constants of other types are others, 1 and 1.0, in tuples too. A module or a schedule counts as the same
            only if it is the same object. A module's weights and buffers may change in place; where they were moved,
            cast or replaced, it is recorded anew. What else decides what a module does, as hooks, a LoRA's scale, parts
            taken away and other strides of the same memory do, stays as it was recorded: call the executor's `reset()`
            after changing it, and before `torch.utils.swap_tensors`, which refuses weights that a graph reads.
        but no TrunkCache: a graph would read what it held when it was recorded.

    Args:
        function: returns a tensor or a tuple of tensors; its only side effects may be those on its caches.
        mode: "captured", or "gated": the device decides. Then `function(trajectory, noise, schedule)` must run a whole
            trajectory (`harmonica_dit.denoise`), and the executor is a `harmonica_kernels.graphs.Gated`: one graph
            serves every router, schedule and threshold, and changing them is a memory write.
        rule: what decides in mode "gated": "scores" (of a router or schedule), or "change" (how far the first branch's
            output has moved).
        graphs: how many graphs are kept alive; the least recently used one goes first. They share one memory pool,
            which is freed with the last of them.

    Returns:
        The executor. Its results are the caller's own. Two threads or streams must not use it at once.

    Raises:
        TypeError: function cannot be called.
        ValueError: mode, rule or graphs is out of range.
        When called: RuntimeError with grad enabled, or if the function cannot be captured because it waits for the
        GPU, copies from the host or draws random numbers; torch.OutOfMemoryError if memory is short; TypeError or
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

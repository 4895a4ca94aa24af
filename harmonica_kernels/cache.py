"""The feature cache: each branch's latest output, and those before it where a schedule forecasts."""

import weakref
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops import cache_commit

HISTORY = 4  # outputs or states kept at most


def check_history(history) -> None:
    """Raises ValueError unless a cache can keep so many outputs or states."""
    if type(history) is not int or not 1 <= history <= HISTORY:
        raise ValueError(f"history: got {history!r}, expected a whole number from 1 to {HISTORY}")


def check_runs(runs) -> tuple[int, ...]:
    """The runs as a tuple; raises ValueError unless they are whole numbers from 1 on."""
    if not isinstance(runs, Sequence) or not runs or not all(type(n) is int and n > 0 for n in runs):
        raise ValueError(f"runs: got {runs!r:.80}, expected whole numbers from 1 on")
    return tuple(runs)


def run_spans(runs: Sequence[int] | None, branches: int) -> list[tuple[int, int]]:
    """The first branch of each run, and the one after its last. runs: how many each holds; None is one each.

    Raises:
        ValueError: the runs hold another number of branches.
    """
    runs = (1,) * branches if runs is None else runs
    if sum(runs) != branches:
        raise ValueError(f"runs: hold {sum(runs)} branches, there are {branches}")
    ends = list(accumulate(runs))
    return list(zip([0, *ends], ends))


class Forward(NamedTuple):
    """What has to be the same in all forwards of a trajectory."""

    shape: tuple[int, ...]  # of x
    dtype: torch.dtype
    device: torch.device
    branches: int

    def __str__(self) -> str:
        return f"{self.branches} branches and x of shape {tuple(self.shape)}, {self.dtype} on {self.device}"


class Whose:
    """Which model a cache's forwards are of. It does not keep the model alive; copied with the model, it is the copy's.
    """

    def __init__(self, model: Any):
        self.model = weakref.ref(model)

    def __eq__(self, other) -> bool:
        return isinstance(other, Whose) and self.model() is other.model() is not None

    def __hash__(self) -> int:
        return id(self.model())

    def __deepcopy__(self, memo: dict) -> "Whose":
        model = self.model()
        return self if model is None else Whose(memo.get(id(model), model))

    def __reduce__(self):
        return type(None), ()  # a pickled cache, which may be read elsewhere, does not say whose it is

    def __str__(self) -> str:
        model = self.model()
        name = getattr(model, "name", None)
        what = f"{type(model).__name__} {name!r}" if isinstance(name, str) else type(model).__name__
        return "a model that is gone" if model is None else f"{what} at {id(model):#x}"


class Setting(NamedTuple):
    """What else has to be the same in all forwards of a trajectory: the model, None if it is not said, and autocast."""

    whose: Whose | None
    autocast: torch.dtype | None


class Memory:
    """What the caches share: they serve one trajectory, whose forwards are alike, are of one model, and all end.

    One thread at a time: forwards of two threads with one cache are an error where the cache sees them, and are not
    kept apart.
    """

    def __init__(self, history: int = 1):
        check_history(history)
        self.history = history
        self.reset()

    def reset(self) -> None:
        """Forgets everything and frees its memory; the next trajectory may have any shape."""
        self._of: tuple | None = None  # every forward must match
        self._setting: Setting | None = None  # and this; None until a forward begins
        self._open = False  # a forward has begun and not ended

    def _held(self) -> Sequence[Tensor]:
        """The tensors that another forward would read or write."""
        return ()

    def _check(self, of: tuple, model: Any = None, autocast: torch.dtype | None = None) -> None:
        """Raises if this cache cannot serve such a forward. model: whose it is, if known. autocast: its dtype."""
        if self._open:
            raise RuntimeError("cache: the last forward with this cache did not finish, or runs in another thread, so "
                               "it holds two steps mixed; call cache.reset() and start the trajectory again, and give "
                               "each thread a cache of its own")
        if self._of is not None and self._of != of:
            raise ValueError(f"cache: holds a forward of {self._of}, got {of}; another trajectory, such as that of the "
                             "calls without prompt, needs a cache of its own, or cache.reset() before it")
        if self._setting is not None:
            whose, before = self._setting
            if whose is not None and model is not None and whose.model() is not model:
                raise ValueError(f"cache: holds a forward of {whose}, got one of {Whose(model)}, another model; it "
                                 "needs a cache of its own, or cache.reset() before its first step")
            if before != autocast:
                raise ValueError(f"cache: holds a forward {_under(before)}, got one {_under(autocast)}; run all steps "
                                 "of a trajectory alike, or call cache.reset() before the first one")
        if torch.compiler.is_compiling():
            return  # torch.compile knows neither of the two questions
        if not torch.is_inference_mode_enabled() and any(t.is_inference() for t in self._held()):
            mode = "with grad enabled" if torch.is_grad_enabled() else "under torch.no_grad()"
            raise ValueError(f"cache: holds a forward under torch.inference_mode(), got one {mode}, where such memory "
                             "cannot be written to; run all steps of a trajectory in one mode, or call cache.reset() "
                             "before the first one")

    def _begin(self, of: tuple, model: Any = None, autocast: torch.dtype | None = None) -> None:
        """Begins a forward that `_check` has accepted; `_end` ends it."""
        if self._setting is None or (self._setting.whose is None and model is not None):
            self._setting = Setting(None if model is None else Whose(model), autocast)
        self._of, self._open = of, True

    def _end(self) -> None:
        self._open = False


def _under(autocast: torch.dtype | None) -> str:
    return "without autocast" if autocast is None else f"under autocast to {autocast}"


class FeatureCache(Memory):
    """The memory of one trajectory: per entry the last `history` computed outputs [B, N, D].

    An entry is a branch, whose output is kept before the residual gate; or, where `runs` says so, a run of branches
    that are computed and reused together, of which is kept what they add to the residual stream.

    The first forward that stores an output allocates one arena [history, K, B, N, D], for the shape of its x and in
    the dtype of that output. With more than one slot per entry, a new output goes into the oldest slot and the slots
    change roles by index, without a copy. If a score on the device decides whether an output is stored, the host cannot
    do that; the latest output is then copied into the other of two slots before it is replaced.

    Args:
        history: outputs kept per entry, 1 to 4: 1 repeats, p + 1 forecast to order p. Soft rows take 1 or 2.
        runs: how many branches each entry holds, in execution order; None is one each. Soft rows take one each.
    """

    def __init__(self, history: int = 1, runs: Sequence[int] | None = None):
        self.runs = None if runs is None else check_runs(runs)
        super().__init__(history)

    def reset(self) -> None:
        super().reset()
        self._arena: Tensor | None = None
        self._slots: list[list[Tensor]] = []  # per entry, newest first
        self._filled: list[int] = []  # per entry, how many of its slots hold a computed output
        # Renewals that wait for a backward: entry, output, score, threshold.
        self._pending: list[tuple[int, Tensor, Tensor | None, float]] = []

    def _held(self) -> Sequence[Tensor]:
        return () if self._arena is None else (self._arena,)

    def rewind(self) -> None:
        """Forgets the outputs but keeps the memory, for another trajectory of the same shapes."""
        self._filled = [0] * len(self._slots)
        for slots in self._slots:
            slots.sort(key=lambda slot: slot.data_ptr())  # the order of the arena
        self._pending, self._open, self._setting = [], False, None

    @property
    def nbytes(self) -> int:
        """Bytes held: history·K·B·N·D values once the first forward has run."""
        return 0 if self._arena is None else self._arena.nbytes

    @property
    def dtype(self) -> torch.dtype | None:
        """The entries' dtype; None before the first is stored."""
        return None if self._arena is None else self._arena.dtype

    def filled(self, k: int) -> int:
        """How many outputs of branch k the cache holds, 0 to `history`.

        With history 2, a lone output is copied into the second slot before a score on the device decides about its
        renewal. It then counts as two outputs, and a forecast from them repeats it.
        """
        return self._filled[k] if self._filled else 0

    def latest(self, k: int) -> Tensor:
        """Branch k's newest output [B, N, D]: the buffer itself, valid until the branch is computed again."""
        return self._slots[k][0]

    def previous(self, k: int) -> Tensor | None:
        """Branch k's output before the latest one, or None if there is none yet."""
        return self._slots[k][1] if self.filled(k) > 1 else None

    def outputs(self, k: int) -> list[Tensor]:
        """Branch k's outputs that the cache holds, the newest first."""
        return self._slots[k][: self.filled(k)]

    def copy_(self, other: "FeatureCache") -> "FeatureCache":
        """Becomes equal to `other`, reusing this cache's memory where the shapes agree. Returns itself.

        Calls `other.commit()` first, so the backward through `other`'s last forward must be done.
        """
        other.commit()
        unlike = (self._of, self.history, self.runs, self.dtype) != (other._of, other.history, other.runs, other.dtype)
        if unlike or (not torch.is_inference_mode_enabled() and any(t.is_inference() for t in self._held())):
            self.history, self.runs = other.history, other.runs
            self.reset()
            self._of = other._of
            if other._arena is not None:
                self._allocate(other._arena.dtype)
        for mine, theirs, filled in zip(self._slots, other._slots, other._filled, strict=True):
            for slot in range(filled):
                mine[slot].copy_(theirs[slot])
        self._filled, self._pending, self._open = list(other._filled), [], other._open
        self._setting = other._setting
        return self

    def commit(self) -> None:
        """Renews the entries that the last soft forward has decided to renew, `latest ← o`. Call it after the backward.

        The backward reads the old entries, so the renewal waits for it. The next forward calls this by itself.
        """
        pending, self._pending = self._pending, []
        for k, o, score, threshold in pending:
            if score is None:
                self._push(k, o.dtype).copy_(o)
                continue
            latest, *previous = self._slots[k]
            if previous and self._filled[k] == 1:
                previous[0].copy_(latest)
                self._filled[k] = 2
            cache_commit(latest, o, score, threshold, previous=previous[0] if previous else None)

    # Called by `cached_forward`.

    def _allocate(self, dtype: torch.dtype) -> None:
        shape, _, device, branches = self._of
        entries = branches if self.runs is None else len(self.runs)
        self._arena = torch.empty(self.history, entries, *shape, dtype=dtype, device=device)
        # .data gives each entry its own version counter: renewing one must not invalidate another that autograd saved
        self._slots = [[self._arena[slot, k].data for slot in range(self.history)] for k in range(entries)]
        self._filled = [0] * entries

    def _push(self, k: int, dtype: torch.dtype) -> Tensor:
        """Makes branch k's oldest slot its latest and returns it for writing. A new arena gets `dtype`."""
        if self._arena is None:
            self._allocate(dtype)
        slots = self._slots[k]
        slots.insert(0, slots.pop())
        self._filled[k] = min(self._filled[k] + 1, self.history)
        return slots[0]

    def _renew(self, k: int, score: Tensor | None, threshold: float, o: Tensor) -> None:
        """Renews branch k's entry with the blended output o: at once, or with grad enabled at `commit`.

        score: on the device, which renews the entry if the score exceeds the threshold; Python does not wait for it.
            None renews in any case.
        """
        self._pending.append((k, o, score, threshold))
        if not torch.is_grad_enabled():
            self.commit()

    # Called by the executors (graphs/).

    def _state(self) -> tuple | None:
        """The state that a recorded forward relies on, buffer addresses included; None before there are buffers."""
        if self._arena is None:
            return None
        newest = [self._arena] if self.history == 1 else [slots[0] for slots in self._slots]
        return self._of, self._setting, self._open, tuple(self._filled), tuple(map(Tensor.data_ptr, newest))

    def _restore(self, state: tuple) -> None:
        """Goes to a `_state` of the same buffers; the values in them stay as they are."""
        self._of, self._setting, self._open, filled, newest = state
        self._filled = list(filled)
        if self.history == 1:
            return
        for slots, address in zip(self._slots, newest, strict=True):
            newest = [slot.data_ptr() for slot in slots].index(address)
            slots[:] = slots[newest:] + slots[:newest]  # roles only ever go round

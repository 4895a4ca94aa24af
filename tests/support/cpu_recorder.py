"""A stand-in for what records on a GPU, so that all that executors do around it can be tested without one."""

from weakref import WeakSet

import torch

from harmonica_kernels import FeatureCache
from harmonica_kernels.graphs import captured


class CpuRecorder:
    """Records on the CPU: a replay calls again and puts the results where the recording's were.

    As on a GPU, recording computes nothing: what it wrote into outputs and caches is lost.
    """

    recording: bool
    caches: WeakSet[FeatureCache]
    log: list[tuple]

    @classmethod
    def install(cls, monkeypatch):
        """Lets executors record on the CPU until the test ends."""
        cls.recording, cls.caches, cls.log = False, WeakSet(), []
        monkeypatch.setitem(captured.RECORDERS, "cpu", cls)
        allocate = FeatureCache._allocate

        def note(cache, dtype):
            cls.caches.add(cache)
            allocate(cache, dtype)

        monkeypatch.setattr(FeatureCache, "_allocate", note)

    def __init__(self, device):
        self.device = device

    def random_state(self):
        return torch.get_rng_state()

    def record(self, call, alone):
        held = [(cache._arena, cache._arena.clone()) for cache in CpuRecorder.caches if cache._arena is not None]
        CpuRecorder.recording = True
        try:
            output = call()
        finally:
            CpuRecorder.recording = False
            with torch.inference_mode():  # which may write to anything
                for arena, values in held:
                    arena.copy_(values)
        CpuRecorder.log.append(("new pool" if alone else "pool", self))
        outputs = output if isinstance(output, tuple) else (output,)
        for o in outputs:
            o.fill_(float("nan"))
        return Replay(call, outputs, torch.is_inference_mode_enabled()), output

    def free(self, replay):
        CpuRecorder.log.append(("free", replay))
        replay.call = None  # it must not be replayed again


class Replay:
    def __init__(self, call, outputs, inference):
        self.call, self.outputs, self.inference, self.replays = call, outputs, inference, 0

    def replay(self):
        """Writes into outputs and caches; what Python keeps about the caches stays as it was."""
        self.replays += 1
        states = [(cache, cache._state()) for cache in CpuRecorder.caches if cache._arena is not None]
        with torch.inference_mode(self.inference), torch.no_grad():  # the mode that it was recorded in
            found = self.call()
        for cache, state in states:
            cache._restore(state)
        with torch.inference_mode():
            for mine, o in zip(self.outputs, found if isinstance(found, tuple) else (found,), strict=True):
                mine.copy_(o)

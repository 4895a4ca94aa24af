"""A training whose forwards and backwards are replayed, with a recorder that calls again where a GPU would replay, and
with renewals decided as there, on the device: the same bits as without, and nothing recorded anew as the router learns.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import harmonica_dit.train.train as module
import harmonica_kernels as hk
from harmonica_dit.flops import count_flops
from harmonica_dit.models.dit import DiT
from harmonica_dit.router import Router
from harmonica_dit.sample.trajectory import Guided, Trajectory, image_noise, run_eagerly
from harmonica_dit.train import train_router
from harmonica_dit.train.frozen_model import checkpoint_bodies, freeze
from harmonica_dit.train.importance import measure_importance
from harmonica_dit.train.sdt import train_trajectory
from harmonica_dit.train.student import Student, new_executor, student_step
from harmonica_kernels import checks
from harmonica_kernels.graphs.keys import typed
from support.cpu_recorder import CpuRecorder

SETTINGS = dict(steps=5, batch=2, lr=0.1, refresh=10, progress=False, trajectories=8, beta=1e-4)
CASES = [dict(), dict(importance="gain"), dict(extrapolation="learned"), dict(extrapolation=0.5,
                                                                              importance="reference"),
         dict(autocast="bfloat16", compare="noise"), dict(checkpointing=True, guidance=1.0),
         dict(importance_rows="hard", importance="reference"), dict(scheduler="DPMSolverMultistepScheduler"),
         dict(halves="both", guidance_channels=1)]


@pytest.fixture
def recorder(monkeypatch):
    """Calls are recorded from now on, and scores read by the device alone."""
    CpuRecorder.install(monkeypatch)
    monkeypatch.setattr(checks, "HOST", ())
    return CpuRecorder


@pytest.fixture
def executors(monkeypatch):
    """Those that trainings make."""
    made = []

    def note(*args):
        made.append(new_executor(*args))
        return made[-1]

    monkeypatch.setattr(module, "new_executor", note)
    return made


def equals(a, b):
    return all(torch.equal(x, y) for x, y in itertools.zip_longest(a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("options", CASES)
def test_a_recorded_training_ends_with_the_same_bits(net, monkeypatch, executors, options):
    eager = train_router(net, **SETTINGS | options)
    assert executors.pop().graphs == 0
    CpuRecorder.install(monkeypatch)
    monkeypatch.setattr(checks, "HOST", ())
    assert equals(train_router(net, **SETTINGS | options), eager)
    [executor] = executors
    replays = sum(recording.graph.replays for recording in executor._recordings.values())
    assert replays > 8 * (5 - 2)  # more than all students: teachers and λ too


def test_a_training_can_be_told_not_to_record(net, monkeypatch, executors):
    options = SETTINGS | dict(extrapolation="learned")
    on_host = train_router(net, **options)
    executors.clear()
    CpuRecorder.install(monkeypatch)
    monkeypatch.setattr(checks, "HOST", ())
    assert equals(train_router(net, executor="eager", **options), on_host)
    assert not executors


@pytest.mark.parametrize("history", [1, 2])
def test_nothing_is_recorded_anew_as_the_router_learns(net, recorder, executors, history):
    """Every trajectory follows a λ refresh here; what is recorded is so in the first few. One graph is the teacher's,
    one the student's; the forward that fills the cache has one, and computing and blending in the λ refresh. With two
    outputs a branch there are twice as many, since one or two are held, in either order.
    """
    options = dict(extrapolation="learned" if history == 2 else 0)
    counts = {}
    for n in (3, 8):
        recorder.log.clear()
        train_router(net, **SETTINGS | dict(trajectories=n, refresh=5), **options)
        counts[n] = [what for what, _ in recorder.log].count("pool") + 1
    assert counts[3] == counts[8] == executors[-1].graphs == 5 * history
    students = [key for key in executors[-1]._recordings if (0, typed(student_step)) in key]
    assert len(students) == history


class Gradients:
    """An optimiser that takes note of them and moves nothing."""

    def __init__(self, router):
        self.router, self.found = router, []

    def step(self):
        self.found.append([None if p.grad is None else p.grad.clone() for p in self.router.parameters()])

    def zero_grad(self, set_to_none):
        self.router.zero_grad(set_to_none=set_to_none)


def train_three_times(net, router, new_trajectory, noise, run):
    """Three trajectories of one executor: what they saw, all gradients, and the last image."""
    optimizer, cache, seen = Gradients(router), hk.FeatureCache(router.history), []
    T, K = router.steps, len(router.branches)
    for i in range(3):
        trajectory = new_trajectory()
        trajectory.executor = run
        student = Student(router, trajectory, noise + i, cache=cache)
        with freeze(net):
            seen.append(train_trajectory(router, student, optimizer, torch.arange(float(T), device=noise.device),
                                         torch.linspace(0.5, 1.5, K, device=noise.device), 1e-3))
    return seen, optimizer.found, student.x


@pytest.mark.parametrize("coefficients", [False, True])
def test_gradients_and_losses(net, make_router, make_trajectory, noise, monkeypatch, coefficients):
    """Of each row, in trajectories where nearly everything is replayed."""
    router = make_router(coefficients=coefficients, learned=coefficients)
    seen, gradients, image = train_three_times(net, router, make_trajectory, noise, run_eagerly)
    CpuRecorder.install(monkeypatch)
    monkeypatch.setattr(checks, "HOST", ())
    run = new_executor(net, 5)
    again, found, other = train_three_times(net, router, make_trajectory, noise, run)
    assert sum(recording.graph.replays for recording in run._recordings.values()) > 20
    assert torch.equal(image, other)
    for a, b in zip(itertools.chain(*seen), itertools.chain(*again), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(itertools.chain(*gradients), itertools.chain(*found), strict=True):
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
    assert any(g is not None and g.any() for g in gradients[-1])


@pytest.mark.parametrize("rows", ["soft", "hard"])
@pytest.mark.parametrize("kind", ["paper", "reference", "gain"])
def test_importance_of_changing_routers_from_one_executor(net, make_router, make_trajectory, noise, monkeypatch, kind,
                                                          rows):
    routers = [make_router(coefficients=True, scale=scale) for scale in (1.0, 2.0, 3.0, 4.0)]
    eager = [measure_importance(router, make_trajectory(), noise, kind=kind, rows=rows) for router in routers]
    CpuRecorder.install(monkeypatch)
    monkeypatch.setattr(checks, "HOST", ())
    run, cache, graphs = new_executor(net, 5), hk.FeatureCache(2), []
    for router, expected in zip(routers, eager, strict=True):
        trajectory = make_trajectory()
        trajectory.executor = run
        assert torch.equal(measure_importance(router, trajectory, noise, kind=kind, rows=rows, cache=cache), expected)
        graphs.append(run.graphs)
    assert rows == "hard" or graphs[2] == graphs[3] <= 8
    assert 0 < graphs[3] <= 5 + 16


def test_the_student_reads_no_value(net, recorder, monkeypatch):
    """Forward, backward and renewal decide nothing by what a tensor holds: on a GPU each such question would wait."""

    class NoReads(TorchDispatchMode):
        inside = False  # an op, whose kernel for the CPU may read

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function is not torch.ops.aten._local_scalar_dense.default
            self.inside = True
            try:
                return function(*args, **kwargs or {})
            finally:
                self.inside = False

        def tolist(self, tensor):
            assert self.inside
            return tolist(tensor)

    tolist, mode = torch.Tensor.tolist, NoReads()
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: mode.tolist(tensor))

    model, cache = Guided(net, 1.5, 3), hk.FeatureCache(2)
    x, t, rows = torch.randn(2, *net.sample_shape), torch.tensor(500), torch.tensor([0, 3, 4, 4])
    r, e, one = torch.rand(4), torch.rand(4), torch.ones(())

    def steps():
        target = model(x, t, rows, cache=cache)
        for outputs in (3, 4):  # a second output to forecast from is there at the second step
            assert len(student_step(model, x, t, rows, target, r, e, one, cache, 0.5, None, True)) == outputs
        model(x, t, rows, row=r, forecast_weights=e, cache=cache, threshold=0.5)

    with freeze(net), torch.no_grad():
        with mode:
            steps()
        monkeypatch.setattr(checks, "HOST", ("cpu",))
        with pytest.raises(AssertionError), mode:
            cache.rewind()
            steps()


def test_the_student_needs_no_more_memory_of_autograd_than_it_gives_back(net):
    """Nothing that it returns keeps what the backward was made of."""
    model, cache = Guided(net, 1.5, 3), hk.FeatureCache()
    x, t, rows = torch.randn(2, *net.sample_shape), torch.tensor(500), torch.tensor([0, 3, 4, 4])
    with freeze(net), torch.no_grad(), checkpoint_bodies(net):
        target = model(x, t, rows, cache=cache)
        found = student_step(model, x, t, rows, target, torch.rand(4), None, torch.ones(()), cache, 0.5, None, False)
    assert len(found) == 3 and not any(o.requires_grad or o.grad_fn for o in found) and not cache._pending


def test_models_whose_loop_is_on_the_host_and_bad_executors(net):
    class ByItsLoop:
        guided_by_its_loop = True

    assert new_executor(ByItsLoop(), 5) is run_eagerly
    with pytest.raises(ValueError, match='executor: got "gated"|executor: got \'gated\''):
        train_router(net, executor="gated", **SETTINGS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGpu:
    @pytest.fixture
    def large(self):
        """Wide enough that activations outweigh everything else."""
        torch.manual_seed(0)
        net = DiT(input_size=32, patch_size=2, hidden_size=384, depth=4, num_heads=6, num_classes=4)
        with torch.no_grad():
            for p in net.parameters():
                if p.dim() > 1:
                    p.normal_(0, p.shape[-1] ** -0.5)
        return net.eval().cuda()

    @pytest.fixture
    def router(self, large):
        """With forecasts."""
        K = len(large.branches)
        return Router(torch.randn(6, K), large.branch_names, count_flops(large), tuple(range(6, 0, -1)), threshold=0.5,
                      extrapolation=torch.rand(6, K), learn_extrapolation=True).cuda()

    @staticmethod
    def new_trajectory(large):
        return Trajectory(large, torch.tensor([0, 3], device="cuda"), steps=6, autocast="bfloat16")

    def test_gradients_and_losses(self, large, router):
        noise, run = image_noise(1, 0, 2, large.sample_shape).cuda(), new_executor(large, 6)
        eager, recorded = (train_three_times(large, router, lambda: self.new_trajectory(large), noise, how)
                           for how in (run_eagerly, run))
        assert run.graphs >= 4
        (seen, gradients, image), (again, found, other) = eager, recorded
        torch.testing.assert_close(other, image, rtol=1e-2, atol=1e-2)
        for a, b in zip(seen, again, strict=True):
            torch.testing.assert_close(b.losses, a.losses, rtol=1e-2, atol=0)
        for a, b in zip(itertools.chain(*gradients), itertools.chain(*found), strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a - b).norm() <= 0.05 * a.norm()

    @pytest.mark.parametrize("options", [dict(extrapolation="learned"), dict(checkpointing=True), dict(guidance=1.0),
                                         dict(importance_rows="hard", importance="reference")])
    def test_every_kind_of_training_is_recorded(self, large, executors, options):
        router = train_router(large, **SETTINGS | dict(autocast="bfloat16") | options)
        assert executors[0].graphs >= 4 and router.scores().isfinite().all()

    def test_no_step_waits_for_the_device(self, large, router):
        optimizer = torch.optim.AdamW(router.parameters(), 1e-2, eps=1e-16, weight_decay=0)
        run, cache, ones = new_executor(large, 6), hk.FeatureCache(2), torch.ones(8, device="cuda")
        noise = image_noise(1, 0, 2, large.sample_shape).cuda()
        for i in range(5):
            trajectory = self.new_trajectory(large)
            trajectory.executor = run
            student = Student(router, trajectory, noise, cache=cache)
            torch.cuda.set_sync_debug_mode("error" if i == 4 else "default")
            try:
                with freeze(large):
                    train_trajectory(router, student, optimizer, ones[:6], ones, 1e-4)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_peak_memory_does_not_grow(self, large):
        def peak(executor):
            torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
            train_router(large, executor=executor, **SETTINGS | dict(batch=16, autocast="bfloat16"))
            return torch.cuda.max_memory_allocated()

        assert peak("captured") <= 1.05 * peak("eager")

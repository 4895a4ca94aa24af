"""train_router as a whole: targets, interruption, files, arguments."""

import csv
import itertools

import pytest
import torch
from diffusers import DDIMParallelScheduler, DDIMScheduler

import harmonica_dit.train.train as module
from harmonica_dit.files import load_tensors, save_tensors
from harmonica_dit.flops import Flops, count_flops
from harmonica_dit.router import Router
from harmonica_dit.sample.schedulers import ReferenceDDIM
from harmonica_dit.train import check_arguments, start, train_router
from harmonica_dit.train.log import COLUMNS, Log
from harmonica_dit.train.recipes import complete

SMALL = dict(steps=4, batch=2, lr=0.1, refresh=12, progress=False, trajectories=6)
pytestmark = pytest.mark.filterwarnings("ignore:target_")  # twelve entries cannot meet a target to 2 %


def equals(a, b):
    return all(torch.equal(x, y) for x, y in itertools.zip_longest(a.state_dict().values(), b.state_dict().values())) \
        and (a.threshold, a.beta) == (b.threshold, b.beta)


@pytest.fixture(scope="module", params=[
    dict(target_speedup=1.5), dict(beta=1e-5, extrapolation="learned"),
    dict(target_cur=0.4, extrapolation=0.5, scheduler="DPMSolverMultistepScheduler", importance="reference",
         importance_rows="hard", importance_scale="raw", reseed=True, halves="both", guidance_channels=1)],
    ids=["speedup", "learned extrapolation", "another scheduler"])
def training(request, net):
    """Options, and the router of a training with them that nothing interrupts."""
    return request.param, train_router(net, **request.param, **SMALL)


@pytest.mark.parametrize("lr, trajectories", [(1e-2, 40), (1e-1, 60)])
def test_target_speedup_is_met(net, lr, trajectories):
    settings = SMALL | dict(steps=6, lr=lr, trajectories=trajectories, refresh=100)
    router = train_router(net, target_speedup=1.6, **settings)
    assert 1.6 <= router.schedule().speedup <= 1.6 * 1.1  # one entry of the tiny model is worth up to 8 %
    assert router.beta > 0


def test_target_cur_is_met(net):
    router = train_router(net, target_cur=0.5, **SMALL)
    assert router.schedule().cur == 0.5


def test_a_larger_beta_reuses_more(net):
    settings = SMALL | dict(trajectories=40)
    few, many = (train_router(net, beta=beta, **settings).schedule().cur for beta in (1e-9, 1e-2))
    assert few < 0.4 and many == 0.75


@pytest.mark.parametrize("calls", [0, 13, 20, 40])
def test_an_interrupted_training_ends_with_the_same_bits(net, tmp_path, calls, training):
    """Ctrl-C after so many forwards: before the first trajectory is over, in the middle of one, in a λ refresh."""
    options, whole = training
    count = iter(range(calls))

    def interrupt(module, inputs, keywords):
        if keywords and next(count, None) is None:  # neither a teacher's nor the count of FLOPs
            raise KeyboardInterrupt

    out = tmp_path / "run"
    handle = net.register_forward_pre_hook(interrupt, with_kwargs=True)
    try:
        with pytest.raises(KeyboardInterrupt, match="of 6 trajectories; the same call goes on from"):
            train_router(net, out=out, **options, **SMALL)
    finally:
        handle.remove()
    assert all(p.requires_grad for name, p in net.named_parameters() if name != "pos_embed")
    assert equals(train_router(net, out=out, **options, **SMALL), whole)
    assert equals(Router.load(out / "router.safetensors", net), whole)
    with open(out / "log.csv") as file:
        assert [int(line["trajectory"]) for line in csv.DictReader(file)] == list(range(6))
    assert equals(train_router(net, out=out, **options, **SMALL), whole)  # a finished one is read back


def test_files(net, tmp_path):
    train_router(net, target_speedup=1.5, out=tmp_path, **SMALL)
    names = {path.name.split(".")[0] for path in tmp_path.iterdir()}
    assert names == {"checkpoint", "log", "router", "events"}
    assert (tmp_path / "router.png").exists()
    with open(tmp_path / "log.csv") as file:
        lines = list(csv.DictReader(file))
    assert float(lines[-1]["speedup"]) >= 1 and all(float(line["loss"]) > 0 for line in lines)


@pytest.mark.parametrize("change", [dict(lr=0.05), dict(beta=1e-4), dict(seed=1),
                                    dict(extrapolation="learned"), dict(scheduler="DDPMScheduler"), dict(steps=5)])
def test_a_checkpoint_of_other_settings_is_refused(net, tmp_path, change):
    train_router(net, beta=1e-5, out=tmp_path, **SMALL)
    before = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.raises(ValueError, match=f"of a training with {next(iter(change))}="):
        train_router(net, **dict(beta=1e-5, out=tmp_path, **SMALL) | change)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == before


def test_a_training_can_be_extended(net, tmp_path):
    """With the bits of one that was longer from the start, and one file of events; never shortened."""
    options = dict(target_speedup=1.5, **SMALL)
    shorter = options | dict(trajectories=3)
    train_router(net, out=tmp_path / "run", **shorter)
    leftovers = [tmp_path / "run" / f".{name}" for name in (
        "checkpoint.safetensors.0123abcd.safetensors", "log.csv.0123abcd.csv", "router.png.0123abcd.png")]
    kept = [tmp_path / "run" / f".{name}" for name in ("notes.0123abcd.txt", "log.csv.csv", "a.csv.0123abcg.csv")]
    for path in leftovers + kept:
        path.touch()  # as a killed process leaves it
    extended = train_router(net, out=tmp_path / "run", **options)
    assert not any(path.exists() for path in leftovers) and all(path.exists() for path in kept)
    assert equals(extended, train_router(net, out=tmp_path / "whole", **options))
    with open(tmp_path / "run" / "log.csv") as file:
        assert [int(line["trajectory"]) for line in csv.DictReader(file)] == list(range(6))
    (events,) = (tmp_path / "run").glob("events.*")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    logged = [(event.step, value.tag) for event in EventFileLoader(str(events)).Load() for value in event.summary.value]
    assert [step for step, tag in logged if tag == "loss"] == list(range(6))
    with pytest.raises(ValueError, match="trajectories: got 3, but .* has run 6 of them already"):
        train_router(net, out=tmp_path / "run", **shorter)


def test_with_a_target_the_log_says_what_the_frozen_schedule_would_have(net, tmp_path):
    """From the first trajectory on, where all scores are above the threshold of the training."""
    train_router(net, target_speedup=1.5, out=tmp_path, **SMALL | dict(threshold=0.0))
    with open(tmp_path / "log.csv") as file:
        speedups = [float(line["speedup"]) for line in csv.DictReader(file)]
    assert len(speedups) == 6 and min(speedups) >= 1.5


def test_other_weights_are_refused(net, tmp_path):
    train_router(net, beta=1e-5, out=tmp_path, **SMALL)
    bias = net.final_layer.linear.bias
    old = bias.detach().clone()
    with torch.no_grad():
        bias += 1
    with pytest.raises(ValueError, match="of a training with weights="):
        train_router(net, beta=1e-5, out=tmp_path, **SMALL)
    with torch.no_grad():
        bias.copy_(old)


def test_a_file_that_is_no_checkpoint_is_refused(net, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="checkpoint.safetensors is not a whole"):
        train_router(net, beta=1e-5, out=tmp_path, **SMALL)


@pytest.mark.parametrize("missing", ["settings", "threshold", "trajectory", "beta", "seen", "importance", "steering",
                                     "router.logits.0", "optimizer.0.exp_avg", "optimizer.0.step"])
def test_a_checkpoint_that_lacks_something_is_refused(net, tmp_path, missing):
    path = one_checkpoint(net, tmp_path)
    tensors, metadata = load_tensors(path)
    assert missing in tensors or missing in metadata
    save_tensors(path, {name: tensor for name, tensor in tensors.items() if name != missing},
                 {name: value for name, value in metadata.items() if name != missing})
    check_refusal(net, path)


@pytest.mark.parametrize("change", [
    dict(settings=[]), dict(threshold="x"), dict(threshold=2), dict(trajectory=1.5), dict(trajectory=-1),
    dict(beta="x"), dict(seen=None), {"importance": torch.zeros(3)}, {"steering": torch.zeros(1, 1)},
    {"router.logits.0": torch.zeros(7)}, {"router.logits.0": torch.full((4,), float("nan"))},
    {"optimizer.0.exp_avg": torch.zeros(9)}, {"optimizer.0.step": torch.zeros(2)}, {"optimizer.9.step": torch.ones(1)},
    {"optimizer.x.step": torch.ones(1)}, {"optimizer.0": torch.ones(1)}])
def test_a_checkpoint_of_something_else_is_refused(net, tmp_path, change):
    path = one_checkpoint(net, tmp_path)
    tensors, metadata = load_tensors(path)
    changed = {True: {}, False: {}}
    for name, value in change.items():
        changed[isinstance(value, torch.Tensor)][name] = value
    save_tensors(path, tensors | changed[True], metadata | changed[False])
    check_refusal(net, path)


def one_checkpoint(net, folder):
    train_router(net, target_speedup=1.5, out=folder, **SMALL | dict(trajectories=2))
    return folder / "checkpoint.safetensors"


def check_refusal(net, path):
    with pytest.raises(ValueError, match="not a whole training checkpoint") as error:
        train_router(net, target_speedup=1.5, out=path.parent, **SMALL | dict(trajectories=2))
    assert str(path) in str(error.value)


def settings(scheduler):
    given = dict(steps=2, target_speedup=None, target_cur=None, beta=1.0, guidance=1.5, guidance_channels=3,
                 scheduler=scheduler, autocast=None, seed=0)
    return module.Settings(**complete("recommended", given)[0])


def test_a_scheduler_instance_of_another_class_is_another_setting(net):
    schedulers = [cls(num_train_timesteps=1000) for cls in (DDIMScheduler, DDIMParallelScheduler)]
    one, other = (settings(scheduler=scheduler).record(net)["scheduler"] for scheduler in schedulers)
    assert one["config"] == other["config"] and one != other


def test_a_resumed_log_keeps_its_lines_through_an_interruption(tmp_path):
    line = dict.fromkeys(COLUMNS, 1.0)
    with Log(tmp_path, 3, 0, False) as log:
        for n in range(3):
            log.line(**line | dict(trajectory=n))
    whole = (tmp_path / "log.csv").read_bytes()
    with Log(tmp_path, 3, 2, False) as log:  # nothing is closed yet, as after a power failure
        assert (tmp_path / "log.csv").read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
        log.line(**line | dict(trajectory=2))
        assert (tmp_path / "log.csv").read_bytes() == whole


def test_a_branch_without_flops_has_no_cost_to_weigh(net, monkeypatch):
    free = count_flops(net)
    monkeypatch.setattr(start, "count_flops", lambda _: Flops((0.0, *free.branches[1:]), free.fixed))
    with pytest.raises(ValueError, match="costs: .*'blocks.0.attn' costs nothing"):
        train_router(net, beta=1e-5, **SMALL)
    router = train_router(net, target_speedup=1.3, costs="ones", **SMALL)
    assert router.scores().isfinite().all() and router.schedule().speedup >= 1.3


def test_a_folder_that_cannot_be_written_is_an_error_before_training(net, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(module, "_train_one", lambda *_: pytest.fail("it trained"))
    with pytest.raises(OSError, match="file"):
        train_router(net, beta=1e-5, out=tmp_path / "file", **SMALL)


@pytest.mark.parametrize("options, name", [
    (dict(), "exactly one"), (dict(target_speedup=1.5, beta=1.0), "exactly one"),
    (dict(target_speedup=1.5, target_cur=0.5), "exactly one"), (dict(target_speedup=100.0), "target_speedup"),
    (dict(target_speedup=1.0), "target_speedup"), (dict(target_cur=0.9), "target_cur"),
    (dict(target_cur=float("nan")), "target_cur"), (dict(beta=-1.0), "beta"), (dict(beta=float("nan")), "beta"),
    (dict(beta=1.0, steps=1), "steps"), (dict(beta=1.0, steps=2.0), "steps"), (dict(beta=1.0, batch=0), "batch"),
    (dict(beta=1.0, trajectories=0), "trajectories"), (dict(target_speedup=1.5, trajectories=1), "trajectories"),
    (dict(beta=1.0, refresh=0), "refresh"),
    (dict(beta=1.0, lr=0.0), "lr"), (dict(beta=1.0, lr=float("nan")), "lr"), (dict(beta=1.0, eps=0.0), "eps"),
    (dict(beta=1.0, recipe="x"), "recipe: got 'x', expected 'recommended' or 'paper'"),
    (dict(beta=1.0, importance_scale="x"), "importance_scale"), (dict(beta=1.0, reseed=2), "reseed"),
    (dict(beta=1.0, halves="x"), "halves"),
    (dict(beta=1.0, threshold=1.5), "threshold"), (dict(beta=1.0, seed=-1), "seed"),
    (dict(beta=1.0, importance="soft"), "importance"), (dict(beta=1.0, importance_rows="x"), "importance_rows"),
    (dict(beta=1.0, costs="x"), "costs: got 'x'"), (dict(beta=1.0, compare="x"), "compare"),
    (dict(beta=1.0, extrapolation="yes"), "extrapolation"), (dict(beta=1.0, extrapolation=float("inf")),
                                                             "extrapolation"),
    (dict(beta=1.0, scheduler="nonsense"), "scheduler"), (dict(beta=1.0, guidance=float("nan")), "guidance"),
])
def test_bad_arguments_are_named(net, options, name):
    with pytest.raises(ValueError, match=name):
        train_router(net, **SMALL | options)


def test_the_model_is_left_as_it_was(net):
    before = {name: p.clone() for name, p in net.state_dict().items()}
    net.blocks[0].attn.train()
    net.blocks[1].requires_grad_(False)
    wanted = [p.requires_grad for p in net.parameters()]
    try:
        train_router(net, beta=1e-5, **SMALL)
        assert net.blocks[0].attn.training and not net.training
        assert [p.requires_grad for p in net.parameters()] == wanted
    finally:
        net.eval()
        net.blocks[1].requires_grad_(True)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(net, tmp_path, monkeypatch):
    whole = train_router(net, beta=1e-5, **SMALL)
    real = module.train_trajectory

    def break_one(router, student, *arguments, **options):
        seen = real(router, student, *arguments, **options)
        return seen._replace(losses=seen.losses * float("nan")) if next(count) == 3 else seen

    count = itertools.count()
    monkeypatch.setattr(module, "train_trajectory", break_one)
    with pytest.raises(FloatingPointError, match="the loss is not finite in trajectory 3"):
        train_router(net, beta=1e-5, out=tmp_path, **SMALL)
    monkeypatch.undo()
    assert equals(train_router(net, beta=1e-5, out=tmp_path, **SMALL), whole)


def test_a_gradient_that_is_not_finite_stops_and_keeps_the_last_checkpoint(net, tmp_path, monkeypatch):
    whole = train_router(net, beta=1e-5, **SMALL)
    real, count = module.Student.learn, itertools.count()

    def break_one(student, r, *arguments):
        if next(count) == 7:  # the second row of the third trajectory
            r.backward(torch.full_like(r, float("nan")), retain_graph=True)
        return real(student, r, *arguments)

    monkeypatch.setattr(module.Student, "learn", break_one)
    with pytest.raises(FloatingPointError, match="the router is not finite in trajectory 2"):
        train_router(net, beta=1e-5, out=tmp_path, **SMALL)
    monkeypatch.undo()
    assert equals(train_router(net, beta=1e-5, out=tmp_path, **SMALL), whole)


def test_a_scheduler_is_the_same_setting_in_every_process(net):
    """diffusers notes which values are defaults, in the order of a set."""
    one, other = DDIMScheduler(clip_sample=False), DDIMScheduler(clip_sample=False)
    defaults = list(reversed(one.config["_use_default_values"]))
    assert len(defaults) > 1
    other._internal_dict = type(other.config)(dict(other.config) | {"_use_default_values": defaults})
    records = [settings(scheduler=scheduler).record(net) for scheduler in (one, other)]
    assert records[0] == records[1]


def test_the_references_ddim_has_its_name_as_an_instance_too(net):
    router = train_router(net, beta=1e-5, scheduler=ReferenceDDIM(), **SMALL)
    assert router.scheduler == "ddim" and equals(router, train_router(net, beta=1e-5, scheduler="ddim", **SMALL))


def test_arguments_are_checked_without_a_model():
    check_arguments(target_speedup=1.5)
    for arguments, name in ((dict(), "exactly one"), (dict(beta=1.0, lr=0.0), "lr"), (dict(beta=1.0, steps=1), "steps"),
                            (dict(beta=1.0, dtype="float16"), "float16")):
        with pytest.raises(ValueError, match=name):
            check_arguments(**arguments)


def test_the_seed_decides(net):
    a, b, c = (train_router(net, beta=1e-5, **SMALL | dict(seed=seed)) for seed in (0, 0, 1))
    assert equals(a, b) and not equals(a, c)

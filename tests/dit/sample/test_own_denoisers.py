"""A denoiser of one's own: what it may be like, what it lacks is named; and what `sample` takes as a schedule."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

import harmonica_dit
from harmonica_dit.evaluate import compare, fewer_steps
from harmonica_dit.flops import count_flops
from harmonica_dit.methods import fora, trunk_forecast
from harmonica_dit.models import DiT
from harmonica_dit.router import Router
from harmonica_dit.sample import make_scheduler, sample
from harmonica_dit.train import train_forecaster, train_router

TRAINING = dict(steps=3, beta=1e-3, trajectories=1, batch=1, progress=False)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return DiT(8, 4, 1, 16, 2, 2, num_classes=4, learn_sigma=False, name="mine").eval().requires_grad_(False)


def test_branches_may_be_a_tuple(net):
    flops = count_flops(net)
    trained = train_router(net, **TRAINING, checkpointing=True).scores()
    net.branches = tuple(net.branches)
    before = net.branches
    assert count_flops(net) == flops
    assert torch.equal(train_router(net, **TRAINING, checkpointing=True).scores(), trained)
    assert net.branches is before


@pytest.mark.parametrize("name", ["name", "num_classes", "width", "branches"])
def test_what_a_denoiser_lacks_is_named(net, name):
    delattr(net, name)
    for call in (lambda: sample(net, [0], steps=2), lambda: train_router(net, **TRAINING),
                 lambda: train_forecaster(net, 1.4, steps=3, progress=False),
                 lambda: compare(net, [fewer_steps(4, 2)], [0], steps=4)):
        with pytest.raises(TypeError, match=f"net: DiT has no {name}, which a denoiser needs"):
            call()


@pytest.mark.parametrize("scheduler", [None, "FlowMatchEulerDiscreteScheduler"])
def test_a_flow_scheduler_by_name_is_the_models_own(net, scheduler):
    net.scheduler = "FlowMatchEulerDiscreteScheduler"
    own = FlowMatchEulerDiscreteScheduler()
    own.set_timesteps(3)
    assert make_scheduler(scheduler, 3, net).timesteps.tolist() == own.timesteps.tolist()
    assert type(make_scheduler("FlowMatchHeunDiscreteScheduler", 3, net)).__name__ == "FlowMatchHeunDiscreteScheduler"
    with pytest.raises(ValueError, match="DDIMScheduler is for models that predict the noise"):
        make_scheduler("DDIMScheduler", 3, net)


def test_sample_takes_a_router_and_files(net, tmp_path):
    """As `enable_cache` does, and with the same warning of other guidance."""
    router = Router(torch.zeros(3, 4).index_fill(0, torch.tensor(1), -3.0), net.branch_names, count_flops(net),
                    (999, 500, 0), threshold=0.4, model="mine", guidance=1.5)
    router.save(tmp_path / "router.safetensors")
    router.schedule().save(tmp_path / "schedule.safetensors")
    expected = sample(net, [0, 1], schedule=router.schedule())
    assert not torch.equal(expected, sample(net, [0, 1], steps=3))
    for given in (router, tmp_path / "router.safetensors", str(tmp_path / "schedule.safetensors")):
        assert torch.equal(sample(net, [0, 1], schedule=given), expected)
    with pytest.warns(UserWarning, match="made for guidance 1.5, the trajectory's is 3"):
        sample(net, [0], schedule=router, guidance=3.0)
    with pytest.raises(FileNotFoundError, match="no file at nowhere; bundled are"):
        sample(net, [0], schedule="nowhere")
    with pytest.raises(ValueError, match="the model 'mine' has"):
        sample(net, [0], schedule="fashion-dit-2.0x")


def test_a_schedule_is_a_line(net):
    assert repr(fora(net, 4, 2)) == ("<Schedule FORA, every 2: 4 steps, 4 branches, CUR 50.0%, FLOPs speedup "
                                     f"{fora(net, 4, 2).speedup:.2f}×>")
    assert "\n" not in repr(trunk_forecast(net, 4, every=2))


def test_a_batch_that_cannot_fit_is_refused(net):
    for call in (lambda: train_router(net, **TRAINING | dict(batch=10**12)),
                 lambda: train_forecaster(net, 1.4, steps=3, batch=10**12, progress=False),
                 lambda: harmonica_dit.measure_costs(net, batch=10**12)):
        with pytest.raises(ValueError, match="batch: got 1000000000000, which takes .* GiB at least; cpu has "):
            call()

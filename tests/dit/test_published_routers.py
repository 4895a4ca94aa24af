"""Routers of the published code: the rows' order, whose rule decides, files that are not what they should be."""

import argparse
import pickle

import pytest
import torch
from diffusers import DiTTransformer2DModel
from typer.testing import CliRunner

import harmonica_dit.cli
from harmonica_dit.flops import count_flops
from harmonica_dit.models import CONFIGS, DiT
from harmonica_dit.pipelines.adapters import adapt
from harmonica_dit.published_routers import _branches_and_flops, _empty, load_published_router
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule
from harmonica_dit.validate import check_fits

T, DEPTH = 6, 2
SMALL = dict(input_size=8, patch_size=4, in_channels=1, hidden_size=16, num_heads=2, num_classes=4)


@pytest.fixture(scope="module")
def net():
    return DiT(**SMALL, depth=DEPTH, name="tiny")


def logits(seed=0, K=2 * DEPTH, rows=T):
    return torch.randn(rows, K, generator=torch.Generator().manual_seed(seed)) * 3


def write(path, rows, **more):
    """A file of the published code's form; its entry i belongs to the i-th timestep in rising order."""
    torch.save({"routers": {f"{i}.prob": row.clone() for i, row in enumerate(rows)}, "opt": None, **more}, path)
    return path


def test_every_row_of_harmonica_counts_and_the_noisiest_comes_first(net, tmp_path):
    rows = logits()
    router = load_published_router(write(tmp_path / "r.pt", rows), "harmonica", net=net)
    assert (router.steps, router.branches, router.model, router.threshold) == (T, net.branch_names, "tiny", 0.1)
    assert router.flops == count_flops(net) and router.timesteps == (999, 799, 599, 400, 200, 0)
    for s in range(1, T):
        assert torch.equal(router.score(s), rows[T - 1 - s].sigmoid())
    compute = router.schedule().compute
    assert compute[0].all()
    assert compute[1:].tolist() == [[p.sigmoid() > 0.1 for p in rows[T - 1 - s]] for s in range(1, T)]


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.999])
def test_learning_to_cache_computes_everything_at_odd_entries(net, tmp_path, threshold):
    rows = logits(1)
    rows[1::2] = -5.0  # whatever the file holds there
    router = load_published_router(write(tmp_path / "r.pt", rows), net=net, threshold=threshold)
    compute = router.schedule().compute
    for s in range(T):
        i = T - 1 - s
        expected = [True] * 4 if i % 2 else [p.sigmoid().item() > threshold for p in rows[i]]
        assert compute[s].tolist() == expected
    assert 0 < router.schedule().cur < 1
    router.save(tmp_path / "r.safetensors")
    assert Router.load(tmp_path / "r.safetensors", net).schedule().rows == router.schedule().rows


def test_an_odd_number_of_rows_is_none_of_learning_to_caches(net, tmp_path):
    path = write(tmp_path / "r.pt", logits(rows=5))
    with pytest.raises(ValueError, match="r.pt: holds 5 rows.*even"):
        load_published_router(path, net=net)
    assert load_published_router(path, "harmonica", net=net).steps == 5


def test_the_file_names_its_model(tmp_path):
    rows = logits(K=24)
    settings = argparse.Namespace(model="DiT-S/8", image_size=512)
    router = load_published_router(write(tmp_path / "r.pt", rows, args=settings))
    assert router.model == "DiT-S/8" and len(router.branches) == 24 and router.branches[3] == "blocks.1.mlp"
    router = load_published_router(write(tmp_path / "xl.pt", logits(K=56)), "harmonica")
    assert router.model == "DiT-XL/2" and router.branches[-2:] == ("blocks.27.attn", "blocks.27.mlp")
    assert router.flops.total == pytest.approx(2 * 118.64e9, rel=1e-3)  # Peebles & Xie, table 1: Gflops of 2 each


def test_flops_of_two_blocks_give_the_whole_models():
    config = SMALL | dict(depth=5)
    branches, flops = _branches_and_flops(config)
    whole = _empty(config)
    assert branches == whole.branch_names and flops == count_flops(whole)


def test_the_same_file_fits_diffusers_dit(tmp_path):
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                        num_layers=DEPTH, sample_size=6, patch_size=2, num_embeds_ada_norm=10)
    path = write(tmp_path / "r.pt", logits(), args=argparse.Namespace(model="DiT-XL/2", image_size=256))
    router = load_published_router(path, net=transformer)
    assert router.branches == ("transformer_blocks.0.attn1", "transformer_blocks.0.ff", "transformer_blocks.1.attn1",
                               "transformer_blocks.1.ff")
    N, D = 9, 16
    assert router.flops.branches[:2] == (4 * 2 * N * D * D + 4 * N * N * D, 2 * 2 * N * D * 4 * D)
    assert router.architecture == adapt(transformer).architecture and router.resolution == (32, 32)
    check_fits("", router.schedule(), adapt(transformer))  # what `apply` asks


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit('the file was run')",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # torch's, of one of the damaged files
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # torch's before 2.13
def test_hostile_files_are_refused_by_name(net, tmp_path):
    path = tmp_path / "r.pt"
    rows = logits()
    good = {f"{i}.prob": row for i, row in enumerate(rows)}

    def check_refusal(message, content=None, **options):
        if content is not None:
            torch.save(content, path)
        with pytest.raises(ValueError, match=message) as error:
            load_published_router(path, **({"net": net} | options))
        assert str(path) in str(error.value)

    for content in (rows, [rows], {}, {"routers": rows}, {"model": good}):
        check_refusal("expected a dict with \"routers\"", content)
    check_refusal("0 entries", {"routers": {}})
    check_refusal("1 entries", {"routers": {"0.prob": rows[0]}})
    check_refusal("3.prob is missing", {"routers": good | {"9.prob": good["3.prob"]}} | {
        "routers": {name: row for name, row in (good | {"9.prob": rows[3]}).items() if name != "3.prob"}})
    for bad, said in ((rows[0, :3], "shape"), (rows[0].half(), "float16"), (torch.full((4,), float("nan")), "finite"),
                      (rows, "shape"), (7, "int"), (rows[0].to_sparse(), "4 finite"),
                      (torch.zeros(1).expand(10**12), "shape")):
        check_refusal(f"2.prob: got .*{said}", {"routers": good | {"2.prob": bad}})
    for bad in (torch.zeros(1).expand(10**12), rows[0, :2], 7):  # the first row says how many branches there are
        check_refusal("branches", {"routers": good | {"0.prob": bad}})
    torch.save({"routers": good, "opt": None}, path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:100], whole[:-30], b"\x80\x04" + whole):
        path.write_bytes(damaged)
        check_refusal("not a checkpoint of plain tensors(?!.*could run code)")
    for write_it in (lambda: torch.save({"routers": good, "args": Malicious()}, path),
                     lambda: path.write_bytes(pickle.dumps(Malicious(), 2))):
        write_it()
        check_refusal("not a checkpoint of plain tensors: it holds .*exec, and reading that could run code")
    check_refusal("image_size: got a tensor", {"routers": good, "args": argparse.Namespace(image_size=torch.zeros(3))})
    for settings in (argparse.Namespace(model="DiT-XXL/1"), argparse.Namespace(model=[1]),
                     argparse.Namespace(model="DiT-XL/2", image_size=[256])):
        check_refusal("not known here; pass it as net=", {"routers": good, "args": settings}, net=None)
    check_refusal("DiT-XL/2 has 56 branches.*net=", {"routers": good}, net=None)


@pytest.mark.parametrize("error", [
    PermissionError("not yours"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch, error):
    def load(*args, **kwargs):
        raise error

    path = write(tmp_path / "r.pt", logits())
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)):
        load_published_router(path)


def test_arguments_are_checked(net, tmp_path):
    path = write(tmp_path / "r.pt", logits())
    with pytest.raises(ValueError, match="kind: got 'teacache'.*learning-to-cache"):
        load_published_router(path, "teacache", net=net)
    with pytest.raises(ValueError, match="threshold"):
        load_published_router(path, net=net, threshold=2)
    with pytest.raises(FileNotFoundError, match="no file at"):
        load_published_router(tmp_path / "none.pt", net=net)


def test_show_draws_a_published_file(tmp_path):
    rows = logits(K=24)
    rows[1::2] = -5.0
    path = write(tmp_path / "r.pt", rows, args=argparse.Namespace(model="DiT-S/8"))
    for kind in ("learning-to-cache", "harmonica"):
        result = CliRunner().invoke(harmonica_dit.cli.app, ["show", str(path), "--kind", kind])
        assert result.exit_code == 0 and (tmp_path / "r.png").exists(), result.output
        assert f"CUR {load_published_router(path, kind).schedule().cur:.1%}" in result.output
    assert CliRunner().invoke(harmonica_dit.cli.app, ["show", str(path), "--kind", "x"]).exit_code == 2


def test_the_shipped_table_is_learning_to_caches(pytestconfig):
    """20 steps of DiT-XL/2 at threshold 0.1, as Learning-to-Cache's own sampler runs them."""
    schedule = Schedule.load(pytestconfig.rootpath / "bench" / "data" / "ltc_dit_xl_2_t20.safetensors")
    assert schedule.compute.sum(1).tolist() == [56, 0, 56, 0, 56, 4, 56, 8, 56, 26, 56, 53, 56, 55, 56, 55, 56, 55, 56,
                                                56]
    assert round(schedule.cur, 4) == 0.2214 and schedule.history == 1
    assert (schedule.branches, schedule.flops) == _branches_and_flops(CONFIGS["DiT-XL/2"] | dict(input_size=32))
    assert schedule.model == "DiT-XL/2" and schedule.timesteps[:3] == (999, 946, 894)
    assert "Learning-to-Cache" in schedule.origin

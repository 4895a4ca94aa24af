"""Pictures are written whole, in sane sizes; what cannot be drawn is refused."""

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from harmonica_dit.evaluate.heat_maps import plot_router, plot_schedule, plot_schedules
from harmonica_dit.evaluate.pictures import image_grid, image_sheet
from harmonica_dit.evaluate.plots import COLOURS, _panel, plot_along, plot_tradeoff
from harmonica_dit.flops import Flops
from harmonica_dit.schedule import Schedule

NAMES = tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp"))


def size(path):
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG"
        return image.size


def test_image_grid(tmp_path):
    path = tmp_path / "deep" / "grid.png"  # the folder is made
    image_grid([torch.rand(4, channels, 6, 6) for channels in (1, 1)], ["one", "two\nmore"], path, "abcd")
    width, height = size(path)
    assert 300 < width < 1500 and 150 < height < 800
    with pytest.raises(ValueError, match="rows"):
        image_grid([torch.rand(4, 1, 6, 6), torch.rand(3, 1, 6, 6)], ["one", "two"], path)
    with pytest.raises(ValueError, match="titles"):
        image_grid([torch.rand(4, 1, 6, 6)], ["one", "two"], path)


@pytest.mark.parametrize("channels, mode", [(1, "L"), (3, "RGB")])
def test_image_sheet_keeps_every_pixel(tmp_path, channels, mode):
    images = torch.rand(3, channels, 4, 5) * 2 - 1
    image_sheet(images, tmp_path / "sheet.png", columns=2, enlarge=1)
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.mode == mode and sheet.size == (2 * 7 + 2, 2 * 6 + 2)
        top_left = torch.tensor(list(sheet.crop((2, 2, 7, 6)).tobytes())).view(4, 5, channels).permute(2, 0, 1)
    assert torch.equal(top_left, ((images[0] + 1) * 127.5).round().long())
    with pytest.raises(ValueError, match="channels"):
        image_sheet(torch.rand(1, 4, 4, 4), tmp_path / "latents.png")


@pytest.mark.parametrize("T, K, threshold", [(1, 1, 0.0), (2, 4, 1.0), (20, 6, 0.1), (50, 56, 0.5)])
def test_router(tmp_path, T, K, threshold):
    plot_router(torch.rand(T, K), threshold, tmp_path / "router.png", [f"blocks.{k}.attn" for k in range(K)])
    width, height = size(tmp_path / "router.png")
    assert 300 < width < 2500 and 200 < height < 2500


@pytest.mark.parametrize("extrapolation", [None, torch.ones(4, 6), torch.rand(4, 6)])
def test_schedule(tmp_path, extrapolation):
    compute = torch.rand(4, 6) > 0.5
    compute[0] = True
    schedule = Schedule(compute, NAMES, Flops((1.0,) * 6, 1.0), extrapolation, origin="a test")
    plot_schedule(schedule, tmp_path / "schedule.png")
    width, height = size(tmp_path / "schedule.png")
    assert 300 < width < 1500 and 200 < height < 1500


@pytest.mark.parametrize("count", [1, 5])
def test_schedules_side_by_side(tmp_path, count):
    compute = torch.rand(4, 6) > 0.5
    compute[0] = True
    schedule = Schedule(compute, NAMES, Flops((1.0,) * 6, 1.0))
    plot_schedules({f"method {i}": schedule for i in range(count)}, tmp_path / "schedules.png")
    width, height = size(tmp_path / "schedules.png")
    assert 300 < width < 2200 and 200 < height < 900


def test_errors_along_the_trajectory(tmp_path):
    groups = {"2×": {"a": [0.1, 0.2], "b": [0.1, 0.5]}, "3×": {"c": [0.1, 2.0]}}
    plot_along(groups, dict(a="FORA", b="mine", c="mine"), tmp_path / "along.png")
    width, height = size(tmp_path / "along.png")
    assert 1000 < width < 2000 and 300 < height < 800


def test_tradeoff_against_measured_time_leaves_out_what_was_not_timed(tmp_path):
    rows = [dict(name=name, family=name, flops_speedup=2.0, wall_speedup=time, seed=0, error=0.1, frechet=None)
            for name, time in (("a", 1.5), ("b", None))]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmonica_dit.evaluate.plots._panel", lambda axis, rows, *_: drawn.append([*rows]))
        for against in ("flops_speedup", "wall_speedup"):
            plot_tradeoff({"": rows}, tmp_path / "tradeoff.png", against=against)
    assert [[row["name"] for row in rows] for rows in drawn] == [["a", "b"], ["a"]]


def test_tradeoff(tmp_path):
    def row(name, family, speedup, seed, frechet):
        return dict(name=name, family=family, flops_speedup=speedup, seed=seed, error=0.1 * (speedup - 1),
                    label_accuracy=0.9, frechet=frechet)

    small = [row("uncached", "uncached", 1, 0, None), row("mine", "another method", 1.5, 0, None)]
    large = [row(f"FORA n={n}", "FORA", n, seed, 8.0 + seed) for n in (2, 3) for seed in (0, 1)]
    plot_tradeoff({"small": small}, tmp_path / "one.png")
    plot_tradeoff({"small": small, "large": large}, tmp_path / "two.png", "title")
    (w1, h1), (w2, h2) = size(tmp_path / "one.png"), size(tmp_path / "two.png")
    assert 600 < w1 < w2 < 2500 and 300 < h1 < h2 < 2000


@pytest.mark.parametrize("family", ["uncached", "accurate solution"])
def test_what_methods_are_measured_against_is_a_line_across(family):
    """At its value, whatever it costs: it does not stretch the axis of speedups."""
    axis = Figure().add_subplot()
    rows = [dict(name=family, family=family, flops_speedup=0.1, seed=0, error=0.25),
            *(dict(name=f"FORA n={n}", family="FORA", flops_speedup=n, seed=0, error=0.1 * n) for n in (2, 3))]
    _panel(axis, rows, "error", COLOURS, "flops_speedup")
    across = [line for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert [list(line.get_ydata()) for line in across] == [[0.25, 0.25]]
    assert axis.get_xlim()[0] > 1.5

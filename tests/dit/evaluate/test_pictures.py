"""Pictures are written whole, in sane sizes; what cannot be drawn is refused."""

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from harmonica_dit.evaluate.heat_maps import _mark_forecasts, plot, plot_schedule, plot_schedules
from harmonica_dit.evaluate.pictures import image_grid, image_sheet
from harmonica_dit.evaluate.plots import COLOURS, _looks, _panel, _points, metrics_of, plot_along, plot_tradeoff
from harmonica_dit.flops import Flops
from harmonica_dit.router import Router
from harmonica_dit.schedule import Schedule

NAMES = tuple(f"blocks.{i}.{part}" for i in range(3) for part in ("attn", "mlp"))


def make_router(T, K, forecasts):
    names = tuple(f"blocks.{k}.attn" for k in range(K))
    return Router(torch.randn(T, K), names, Flops((1.0,) * K, 1.0), tuple(range(T, 0, -1)),
                  extrapolation=torch.ones(T, K) if forecasts else None)


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


@pytest.mark.parametrize("T, K, threshold, forecasts", [(2, 1, 0.0, False), (2, 4, 1.0, True), (20, 6, 0.1, True),
                                                        (50, 56, 0.5, False)])
def test_router(tmp_path, T, K, threshold, forecasts):
    plot(make_router(T, K, forecasts), tmp_path / "router.png", threshold=threshold, title="a long title " * 20)
    width, height = size(tmp_path / "router.png")
    assert 300 < width < 2500 and 200 < height < 2500


def test_a_long_title_does_not_widen_a_picture(tmp_path):
    widths = []
    for title in ("short", "a/very/long/name-of-a-file" * 10):
        plot(make_router(10, 6, False), tmp_path / "router.png", title=title)
        widths.append(size(tmp_path / "router.png")[0])
    assert widths[1] < 1.3 * widths[0]


def test_a_router_marks_what_it_forecasts(tmp_path):
    router, axis = make_router(5, 6, True), Figure().add_subplot()
    label, = _mark_forecasts(axis, router.schedule(0.5), "red")
    reused = ~router.schedule(0.5).compute
    assert label.startswith(f"forecast, a = 1 ({reused.float().mean():.0%}")
    steps, branches = axis.lines[0].get_data()
    assert {(int(s), int(k)) for s, k in zip(steps, branches)} == {tuple(e) for e in reused.nonzero().tolist()}
    assert not _mark_forecasts(axis, make_router(5, 6, False).schedule(0.5), "red")


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


def row(name, family, speedup, seed=0, **measured):
    return dict(name=name, family=family, flops_speedup=speedup, wall_speedup=None, seed=seed) | measured


def test_tradeoff_has_panels_for_what_was_measured(tmp_path):
    """A column a metric; a second line of panels where time was measured, without what was not timed."""
    rows = [row("uncached", "uncached", 1.0, wall_speedup=1.0, error=0.0), row("a", "a", 2.0, error=0.1)]
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harmonica_dit.evaluate.plots._panel", lambda axis, rows, key, looks, against: drawn.append(
            (against, key, [row["name"] for row in rows])))
        plot_tradeoff(rows, tmp_path / "tradeoff.png")
        more = [row("b", "b", 2.0, wall_speedup=1.5, error=0.1, frechet=2.0)]
        plot_tradeoff(rows + more, tmp_path / "tradeoff.png", "a title")
    flops, wall, every = "flops_speedup", "wall_speedup", ["uncached", "a", "b"]
    assert drawn == [(flops, "error", ["uncached", "a"]), (flops, "error", every), (flops, "frechet", every),
                     (wall, "error", ["uncached", "b"]), (wall, "frechet", ["uncached", "b"])]


def test_latents_that_nothing_decodes_are_drawn_by_their_own_errors():
    latents = [row("a", "a", 2.0, error=None, latent_error=0.1, accurate_latent_error=0.2)]
    assert [key for key, *_ in metrics_of(latents)] == ["latent_error", "accurate_latent_error"]
    assert [key for key, *_ in metrics_of([latents[0] | dict(error=0.1)])] == ["error"]


@pytest.mark.parametrize("families", [2, 14])
def test_tradeoff(tmp_path, families):
    rows = [row(f"{i} {n}", f"family {i}", n, error=0.1 * (n - 1), label_accuracy=0.9, frechet=8.0 / n)
            for n in (2, 3) for i in range(families)]
    plot_tradeoff([row("uncached", "uncached", 1, error=0.0, frechet=2.0), *rows], tmp_path / "tradeoff.png", "title")
    width, height = size(tmp_path / "tradeoff.png")
    assert 1500 < width < 2500 and 400 < height < 1000


def test_seeds_of_alike_speedups_are_one_point():
    """Of training, which have names and speedups of their own, and of sampling."""
    rows = [row("b", "router", 2.02, error=0.3), row("a", "router", 2.0, error=0.1), row("c", "router", 2.1, error=0.5)]
    points = _points(rows, "error", "flops_speedup")
    assert [tuple(point) for point in points] == [(pytest.approx(2.01), pytest.approx(0.2), 0.1, 0.3),
                                                  (2.1, 0.5, 0.5, 0.5)]


def test_bars_of_one_seed_are_its_interval():
    one = row("a", "router", 2.0, error=0.3, error_low=0.2, error_high=0.5, frechet=3.0, frechet_above=0.5,
              frechet_above_low=0.25, frechet_above_high=1.0)
    assert _points([one], "error", "flops_speedup")[0][2:] == (0.2, 0.5)
    assert _points([one], "frechet", "flops_speedup")[0][2:] == (2.75, 3.5)


def test_every_family_has_a_look_of_its_own():
    looks = _looks(["uncached", *COLOURS, *(f"family {i}" for i in range(12))])
    assert len({(look["color"], look.get("marker"), look.get("linestyle")) for look in looks.values()}) == len(looks)


@pytest.mark.parametrize("family", ["uncached", "accurate solution"])
def test_what_methods_are_measured_against_is_a_line_across(family):
    """At its value, whatever it costs: it does not stretch the axis of speedups."""
    axis = Figure().add_subplot()
    rows = [row(family, family, 0.1, error=0.25), *(row(f"FORA n={n}", "FORA", n, error=0.1 * n) for n in (2, 3))]
    _panel(axis, rows, "error", _looks([family, "FORA"]), "flops_speedup")
    across = [line for line in axis.lines if list(line.get_xdata()) == [0, 1]]
    assert [list(line.get_ydata()) for line in across] == [[0.25, 0.25]]
    assert axis.get_xlim()[0] > 1.5

"""Pictures of samples: a grid with titles, a plain sheet."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from harmonica_dit.files import replacement

from .style import FAINT, save


def image_grid(rows: Sequence[Tensor], titles: Sequence[str], path: str | os.PathLike,
               columns: Sequence[str] | None = None) -> None:
    """Writes rows of images to a PNG, so that images from the same noise stand in one column.

    Args:
        rows: each [n, 1 or 3, H, W] in [-1, 1], all of one shape.
        titles: one per row; the text after the first line break is smaller.
        columns: n headings, such as class names.

    Raises:
        ValueError: the rows differ in shape, are not grey or RGB images, or the titles or columns do not match.
    """
    shapes = {tuple(row.shape) for row in rows}
    if len(shapes) != 1 or len(next(iter(shapes))) != 4 or next(iter(shapes))[1] not in (1, 3):
        raise ValueError(f"rows: got shapes {sorted(shapes)}, expected one shape [n, 1 or 3, H, W]")
    n = len(rows[0])
    if len(titles) != len(rows) or (columns is not None and len(columns) != n):
        raise ValueError(f"got {len(titles)} titles and {columns and len(columns)} columns for {len(rows)} rows of {n}")

    def draw() -> Figure:
        cell = min(0.8, 14 / n)
        figure = Figure((n * cell + 1.5, len(rows) * cell * 1.03))
        axes = figure.subplots(len(rows), n, squeeze=False,
                               gridspec_kw=dict(left=1.5 / (n * cell + 1.5), right=1, top=1, bottom=0, wspace=0.06,
                                                hspace=0.06))
        for line, row, title in zip(axes, rows, titles):
            for axis, image in zip(line, row.float().cpu()):
                pixels = (image.clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy()
                axis.imshow(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels, cmap="gray", vmin=0, vmax=1)
                axis.set_axis_off()
            head, _, rest = title.partition("\n")
            at = dict(xycoords="axes fraction", textcoords="offset points", ha="right", annotation_clip=False)
            line[0].annotate(head, (0, 0.5), (-8, 1 if rest else -3), weight="bold", **at)
            line[0].annotate(rest, (0, 0.5), (-8, -4), va="top", size=7.5, color=FAINT, linespacing=1.3, **at)
        for axis, heading in zip(axes[0], columns or ()):
            axis.annotate(heading, (0.5, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", ha="center",
                          size=7.5, color=FAINT)
        return figure

    save(draw, path)


def image_sheet(images: Tensor, path: str | os.PathLike, columns: int = 10, enlarge: int = 3) -> None:
    """Writes images [n, 1 or 3, H, W] in [-1, 1] to a PNG, `columns` in a row, each pixel `enlarge` times as large.

    Raises:
        ValueError: the images are not grey or RGB.
    """
    n, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images: got {channels} channels, expected 1 or 3")
    pixels = ((images.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pixels = pixels.repeat(enlarge, 1).repeat(enlarge, 2)
    columns, gap = min(columns, n), 2 * enlarge
    high, wide = height * enlarge + gap, width * enlarge + gap
    sheet = np.full((-(-n // columns) * high + gap, columns * wide + gap, channels), 255, np.uint8)
    for i, image in enumerate(pixels):
        top, left = i // columns * high + gap, i % columns * wide + gap
        sheet[top : top + high - gap, left : left + wide - gap] = image
    with replacement(path) as temporary:
        Image.fromarray(sheet.squeeze(2) if channels == 1 else sheet).save(temporary, "PNG")

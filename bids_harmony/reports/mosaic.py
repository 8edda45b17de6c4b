"""Rows of slices put together as one colour image, and its encoding."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from bids_harmony.reports import geometry as geo

Rgb = NDArray[np.float64]
Paint = Callable[[geo.Plane, int], Rgb]

DPI = 100
GAP = 4
BAR_PIXELS = 92


@dataclass(frozen=True)
class Layout:
    """Which slices are shown, and how large.

    Attributes
    ----------
    box
        Crop of the RAS+ volume.
    slices
        Plane and slice indices, one row of the mosaic each.
    spacing, affine
        Of the RAS+ volume.
    mm_per_pixel
        Size of a picture pixel.
    """

    box: geo.Box
    slices: tuple[tuple[geo.Plane, tuple[int, ...]], ...]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    mm_per_pixel: float


@dataclass(frozen=True)
class Text:
    """A word in the picture: centre row and column in pixels."""

    row: float
    column: float
    word: str


@dataclass(frozen=True)
class Mosaic:
    """A picture and what is written on it.

    Attributes
    ----------
    pixels
        Shape (rows, columns, 3), 0..1.
    texts
        Direction letters and slice positions.
    lines
        Pairs of (mask in picture pixels, 0..1; colour): outlined at 0.5.
    """

    pixels: Rgb
    texts: tuple[Text, ...]
    lines: tuple[tuple[NDArray[np.float64], str], ...] = ()


def plan_layout(
    volume: geo.DisplayVolume, mask: geo.BoolArray, *, columns: int, width: int
) -> Layout:
    """Choose crop, slices and scale so that the widest row of `columns` slices is `width` pixels wide."""
    box = geo.head_box(volume.data, mask, volume.spacing)
    millimetres = [(s.stop - s.start) * mm for s, mm in zip(box, volume.spacing, strict=True)]
    widest = max(millimetres[0], millimetres[1]) * columns
    rows = tuple(
        (plane, tuple(geo.choose_slices(mask, geo.NORMAL[plane], columns))) for plane in geo.PLANES
    )
    scale = widest / (width - GAP * (columns - 1))
    return Layout(box, rows, volume.spacing, volume.affine, scale)


def slice_pixels(
    volume: NDArray[Any], layout: Layout, plane: geo.Plane, index: int
) -> NDArray[np.float64]:
    """One cropped slice at the layout's picture scale."""
    image = geo.take_slice(volume, plane, index, layout.box)
    return geo.to_pixels(image, geo.image_spacing(plane, layout.spacing), layout.mm_per_pixel)


def compose(
    layout: Layout,
    paint: Paint,
    shape: tuple[int, ...],
    outlines: Sequence[tuple[geo.BoolArray, str]] = (),
) -> Mosaic:
    """Paint every slice of `layout` and put them in rows.

    Parameters
    ----------
    paint
        Gives the colours, shape (rows, columns, 3), of one slice at the layout's scale.
    shape
        Shape of the volume.
    outlines
        Volumes to outline, with their colours.
    """
    rows, texts = [], []
    marks: list[list[NDArray[np.float64]]] = [[] for _ in outlines]
    top = 0
    for plane, indices in layout.slices:
        tiles = [paint(plane, i) for i in indices]
        rows.append(_row(tiles))
        texts += _row_texts(layout, plane, indices, tiles[0].shape[:2], top, shape)
        for mark, (mask, _) in zip(marks, outlines, strict=True):
            drawn = [slice_pixels(mask, layout, plane, i)[..., None] for i in indices]
            mark.append(_row(drawn))
        top += rows[-1].shape[0] + GAP
    lines = tuple(
        (_stack(mark)[..., 0], colour) for mark, (_, colour) in zip(marks, outlines, strict=True)
    )
    return Mosaic(_stack(rows), tuple(texts), lines)


def _row(tiles: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Tiles of one height side by side, a gap between them."""
    gap = np.zeros((tiles[0].shape[0], GAP, tiles[0].shape[2]))
    parts = [part for tile in tiles for part in (gap, tile)][1:]
    return np.concatenate(parts, axis=1)


def _stack(rows: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Rows below one another, left-aligned on black."""
    width = max(row.shape[1] for row in rows)
    height = sum(row.shape[0] for row in rows) + GAP * (len(rows) - 1)
    canvas = np.zeros((height, width, rows[0].shape[2]))
    top = 0
    for row in rows:
        canvas[top : top + row.shape[0], : row.shape[1]] = row
        top += row.shape[0] + GAP
    return canvas


def _row_texts(
    layout: Layout,
    plane: geo.Plane,
    indices: Sequence[int],
    tile: tuple[int, ...],
    top: int,
    shape: tuple[int, ...],
) -> list[Text]:
    """Direction letters at both sides of every slice and its position below."""
    left, right, _, _ = geo.EDGES[plane]
    axis = geo.NORMAL[plane]
    texts = []
    for number, index in enumerate(indices):
        start = number * (tile[1] + GAP)
        texts.append(Text(top + 12, start + 10, left))
        texts.append(Text(top + 12, start + tile[1] - 10, right))
        position = geo.slice_millimetres(layout.affine, axis, index, shape)
        word = f"{'xyz'[axis]} = {position:.0f} mm"
        texts.append(Text(top + tile[0] - 10, start + tile[1] / 2, word))
    return texts


def grey(image: NDArray[np.float64], window: tuple[float, float]) -> Rgb:
    """Grey levels of `image` in `window` (black, white), shape (rows, columns, 3)."""
    level = np.clip((image - window[0]) / (window[1] - window[0]), 0.0, 1.0)
    return np.repeat(level[..., None], 3, axis=2)


def colours(image: NDArray[np.float64], window: tuple[float, float], cmap: str) -> Rgb:
    """Colours of `image` in `window`, shape (rows, columns, 3)."""
    table = mpl.colormaps[cmap]
    return np.asarray(table(Normalize(*window, clip=True)(image)))[..., :3]


def render(
    mosaic: Mosaic, *, bar: tuple[tuple[float, float], str, str] | None = None, quality: int = 85
) -> bytes:
    """Encode as JPEG.

    Parameters
    ----------
    bar
        Colour bar at the right: window, colour map, label; None for no bar.
    """
    height, width = mosaic.pixels.shape[:2]
    total = width + (BAR_PIXELS if bar else 0)
    figure = Figure(figsize=(total / DPI, height / DPI), dpi=DPI, facecolor="black")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, width / total, 1.0))
    axes.set_axis_off()
    axes.imshow(mosaic.pixels, interpolation="nearest", aspect="auto", vmin=0, vmax=1)
    for mask, colour in mosaic.lines:
        if (mask > 0.5).any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)
    halo = [withStroke(linewidth=2, foreground="black")]
    for text in mosaic.texts:
        size = 9 if len(text.word) == 1 else 7
        axes.text(
            text.column, text.row, text.word, color="white", fontsize=size, ha="center",
            va="center", path_effects=halo,
        )  # fmt: skip
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    if bar:
        _colour_bar(figure, bar, width / total)
    buffer = io.BytesIO()
    canvas.print_jpg(buffer, pil_kwargs={"quality": quality, "optimize": True})
    return buffer.getvalue()


def _colour_bar(figure: Figure, bar: tuple[tuple[float, float], str, str], start: float) -> None:
    """Draw the colour bar with its numbers and unit."""
    window, cmap, label = bar
    room = 1.0 - start
    axes = figure.add_axes((start + 0.18 * room, 0.12, 0.16 * room, 0.76))
    mappable = ScalarMappable(Normalize(*window), mpl.colormaps[cmap])
    colour_bar = figure.colorbar(mappable, cax=axes)
    colour_bar.set_label(label, color="white", fontsize=9)
    colour_bar.outline.set_edgecolor("white")  # type: ignore[operator]
    axes.tick_params(colors="white", labelsize=8)

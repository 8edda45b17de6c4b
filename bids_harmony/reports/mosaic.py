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
STRIP = 16
#: Grey level of a light background: the middle of the diverging colour map.
PAPER = 0.967
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
    width
        Width of the mosaic in pixels.
    """

    box: geo.Box
    slices: tuple[tuple[geo.Plane, tuple[int, ...]], ...]
    spacing: tuple[float, float, float]
    affine: NDArray[np.float64]
    mm_per_pixel: float
    width: int


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
    light
        True: light background, dark words.
    """

    pixels: Rgb
    texts: tuple[Text, ...]
    lines: tuple[tuple[NDArray[np.float64], str], ...] = ()
    light: bool = False


def plan_layout(
    volume: geo.DisplayVolume, mask: geo.BoolArray, *, columns: int, width: int
) -> Layout:
    """Choose crop, slices and scale, the same scale for all planes.

    `columns` slices fill the row whose slices are widest; rows of narrower slices hold more.
    """
    box = geo.head_box(volume.data, mask, volume.spacing)
    x_mm, y_mm, _ = ((s.stop - s.start) * mm for s, mm in zip(box, volume.spacing, strict=True))
    scale = max(x_mm, y_mm) * columns / (width - GAP * (columns - 1))
    rows = []
    for plane in geo.PLANES:
        tile = (y_mm if plane == "sagittal" else x_mm) / scale
        count = min(columns + 2, max(columns, int((width + GAP) / (tile + GAP))))
        rows.append((plane, tuple(geo.choose_slices(mask, geo.NORMAL[plane], count))))
    return Layout(box, tuple(rows), volume.spacing, volume.affine, scale, width)


def slice_pixels(
    volume: NDArray[Any], layout: Layout, plane: geo.Plane, index: int
) -> NDArray[np.float64]:
    """One cropped slice at the layout's picture scale."""
    image = geo.take_slice(volume, plane, index, layout.box)
    return geo.to_pixels(image, geo.image_spacing(plane, layout.spacing), layout.mm_per_pixel)


def compose(
    layout: Layout,
    paint: Paint,
    outlines: Sequence[tuple[geo.BoolArray, str]] = (),
    *,
    light: bool = False,
) -> Mosaic:
    """Paint every slice of `layout` and put them in rows.

    Parameters
    ----------
    paint
        Gives the colours, shape (rows, columns, 3), of one slice at the layout's scale.
    outlines
        Volumes to outline, with their colours.
    light
        Light background instead of black.
    """
    rows, texts = [], []
    marks: list[list[NDArray[np.float64]]] = [[] for _ in outlines]
    top = 0
    for plane, indices in layout.slices:
        tiles = [paint(plane, i) for i in indices]
        rows.append(_row(tiles, layout.width, PAPER if light else 0.0))
        texts += _row_texts(layout, plane, indices, tiles[0].shape[:2], top)
        for mark, (mask, _) in zip(marks, outlines, strict=True):
            drawn = [slice_pixels(mask, layout, plane, i)[..., None] for i in indices]
            mark.append(_row(drawn, layout.width, 0.0))
        top += rows[-1].shape[0]
    lines = tuple(
        (np.concatenate(mark)[..., 0], colour)
        for mark, (_, colour) in zip(marks, outlines, strict=True)
    )
    return Mosaic(np.concatenate(rows), tuple(texts), lines, light)


def row_starts(count: int, tile: int, width: int) -> list[int]:
    """Left columns of `count` tiles spread evenly over `width`."""
    share = width / count
    return [max(0, int(number * share + (share - tile) / 2)) for number in range(count)]


def _row(tiles: Sequence[NDArray[np.float64]], width: int, fill: float) -> NDArray[np.float64]:
    """Tiles of one size spread over `width`, a strip for words below them."""
    height, tile, depth = tiles[0].shape
    row = np.full((height + STRIP, width, depth), fill)
    for start, image in zip(row_starts(len(tiles), tile, width), tiles, strict=True):
        row[:height, start : start + tile] = image[:, : width - start]
    return row


def _row_texts(
    layout: Layout, plane: geo.Plane, indices: Sequence[int], tile: tuple[int, ...], top: int
) -> list[Text]:
    """Direction letters at both sides of every slice and its position below."""
    left, right, _, _ = geo.EDGES[plane]
    axis = geo.NORMAL[plane]
    height, width = tile
    texts = []
    starts = row_starts(len(indices), width, layout.width)
    for start, index in zip(starts, indices, strict=True):
        texts.append(Text(top + 10, start + 9, left))
        texts.append(Text(top + 10, start + width - 9, right))
        position = round(geo.slice_millimetres(layout.affine, axis, index, layout.box))
        word = f"{'xyz'[axis]} = {position} mm".replace("-", "−")
        texts.append(Text(top + height + STRIP / 2 - 1, start + width / 2, word))
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
    mosaic: Mosaic, *, bar: tuple[tuple[float, float], str, str] | None = None, quality: int = 80
) -> bytes:
    """Encode as JPEG.

    Parameters
    ----------
    bar
        Colour bar at the right: window, colour map, label; None for no bar.
    """
    height, width = mosaic.pixels.shape[:2]
    total = width + (BAR_PIXELS if bar else 0)
    ink, back = ("black", str(PAPER)) if mosaic.light else ("white", "black")
    figure = Figure(figsize=(total / DPI, height / DPI), dpi=DPI, facecolor=back)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, width / total, 1.0))
    axes.set_axis_off()
    axes.imshow(mosaic.pixels, interpolation="nearest", aspect="auto", vmin=0, vmax=1)
    for mask, colour in mosaic.lines:
        if (mask > 0.5).any():
            axes.contour(mask, levels=[0.5], colors=[colour], linewidths=1.1)
    halo = [withStroke(linewidth=2, foreground=back)]
    for text in mosaic.texts:
        style: dict[str, Any] = {"color": ink, "ha": "center", "va": "center"}
        size, weight = (9, "bold") if len(text.word) == 1 else (8, "normal")
        where = (text.column, text.row)
        axes.text(*where, text.word, size=size, weight=weight, path_effects=halo, **style)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    if bar:
        _colour_bar(figure, bar, width / total, ink)
    buffer = io.BytesIO()
    canvas.print_jpg(buffer, pil_kwargs={"quality": quality, "optimize": True})
    return buffer.getvalue()


def _colour_bar(
    figure: Figure, bar: tuple[tuple[float, float], str, str], start: float, ink: str
) -> None:
    """Draw the colour bar with its numbers and unit."""
    window, cmap, label = bar
    room = 1.0 - start
    axes = figure.add_axes((start + 0.18 * room, 0.1, 0.16 * room, 0.8))
    mappable = ScalarMappable(Normalize(*window), mpl.colormaps[cmap])
    colour_bar = figure.colorbar(mappable, cax=axes)
    colour_bar.set_label(label, color=ink, fontsize=9, parse_math=False)
    colour_bar.outline.set_edgecolor(ink)
    axes.tick_params(colors=ink, labelsize=8)

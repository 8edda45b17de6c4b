"""The pictures of a scan's report, each as encoded bytes ready to be embedded.

Drawn with matplotlib's object interface only: no display, no global state, same bytes for the
same input.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter1d
from skimage.filters import threshold_otsu

from bids_harmony.imaging.tissues import TISSUES
from bids_harmony.reports import geometry as geo
from bids_harmony.reports import mosaic as mos
from bids_harmony.reports.inputs import Histogram, Registration, ScanReport

FloatArray = NDArray[np.floating[Any]]

WIDTH = 1200
MASK_COLOUR = "#ffb000"
TEMPLATE_COLOUR = "#22d3ee"
TISSUE_COLOURS = {"CSF": "#22d3ee", "GM": "#4ade80", "WM": "#f97316"}
DIFFERENCE_MAP = "RdBu_r"
BIAS_MAP = "viridis"


@dataclass(frozen=True)
class Scene:
    """A scan's volumes in RAS+ with the layout common to all its pictures."""

    before: geo.DisplayVolume
    after: geo.DisplayVolume
    mask: geo.BoolArray
    bias: FloatArray | None
    tissues: NDArray[np.uint8] | None
    layout: mos.Layout
    window: tuple[float, float]
    units: str


def common_window(
    before: FloatArray, after: FloatArray, mask: geo.BoolArray, reference: FloatArray | None = None
) -> tuple[float, float]:
    """Grey window for before and after alike: what the target appearance needs.

    Black is 0, or the 0.5th percentile of the harmonized brain if that is negative; white is the
    larger of the 99.5th percentiles of the harmonized brain and of the reference quantiles. A
    scan brighter than that saturates: the report states the share of such voxels.

    Parameters
    ----------
    before, after, mask
        Shape (X, Y, Z). `before` counts only if the harmonized brain is constant.
    reference
        1-D quantiles of the reference domain on the same scale.
    """
    brain = after[mask]
    low = min(0.0, float(np.percentile(brain, 0.5)))
    high = float(np.percentile(brain, 99.5))
    if reference is not None:
        high = max(high, float(np.percentile(reference, 99.5)))
    if not high > low:
        high = max(float(np.max(before[mask])), low + 1.0)
    return low, high


def saturated_share(volume: FloatArray, mask: geo.BoolArray, window: tuple[float, float]) -> float:
    """Share of brain voxels above the window's white, 0..1."""
    return float(np.mean(volume[mask] > window[1]))


def make_scene(report: ScanReport, *, columns: int = 6, width: int = WIDTH) -> Scene:
    """Bring a scan's volumes to RAS+ and choose the slices all its pictures share."""
    before = geo.display_volume(report.before, report.affine)
    after = geo.display_volume(report.after, report.affine)
    mask = geo.display_volume(report.mask, report.affine).data.astype(bool)
    bias = None if report.bias is None else geo.display_volume(report.bias, report.affine).data
    tissues = None
    if report.tissues is not None:
        shown = geo.display_volume(report.tissues.astype(np.float32), report.affine)
        tissues = np.rint(shown.data).astype(np.uint8)
    reference = report.histogram.reference if report.histogram else None
    window = report.window or common_window(before.data, after.data, mask, reference)
    layout = mos.plan_layout(before, mask, columns=columns, width=width - mos.BAR_PIXELS)
    return Scene(before, after, mask, bias, tissues, layout, window, report.units)


def draw_before(scene: Scene) -> bytes:
    """Three planes of the scan before harmonization, common grey window."""
    return _draw_grey(scene, scene.before.data)


def draw_after(scene: Scene) -> bytes:
    """Three planes of the harmonized scan, same slices and grey window as before."""
    return _draw_grey(scene, scene.after.data)


def _draw_grey(scene: Scene, volume: FloatArray) -> bytes:
    """Mosaic in the scene's grey window with its bar."""
    picture = mos.compose(scene.layout, _grey_paint(scene, volume))
    return mos.render(picture, bar=(scene.window, "gray", scene.units))


def _grey_paint(scene: Scene, volume: FloatArray) -> mos.Paint:
    def paint(plane: geo.Plane, index: int) -> mos.Rgb:
        return mos.grey(mos.slice_pixels(volume, scene.layout, plane, index), scene.window)

    return paint


def draw_mask(scene: Scene) -> bytes:
    """Outline of the brain mask on the scan, in the scan's own grey window."""
    volume = scene.before.data
    own = common_window(volume, volume, scene.mask)
    layout = scene.layout

    def paint(plane: geo.Plane, index: int) -> mos.Rgb:
        return mos.grey(mos.slice_pixels(volume, layout, plane, index), own)

    picture = mos.compose(layout, paint, [(scene.mask, MASK_COLOUR)])
    return mos.render(picture, bar=(own, "gray", scene.units), quality=70)


def draw_tissues(scene: Scene) -> bytes:
    """Outlines of the tissues on the harmonized scan.

    Raises
    ------
    ValueError
        If the scene has no tissues.
    """
    if scene.tissues is None:
        raise ValueError("the scene has no tissues")
    outlines = [(scene.tissues == TISSUES[k], colour) for k, colour in TISSUE_COLOURS.items()]
    picture = mos.compose(scene.layout, _grey_paint(scene, scene.after.data), outlines)
    return mos.render(picture, bar=(scene.window, "gray", scene.units), quality=70)


def difference_limit(scene: Scene) -> float:
    """Half-width of the difference scale: 99th percentile of the absolute change in the brain.

    The largest change anywhere if that percentile is 0; 0 when nothing changed.
    """
    change = np.abs(scene.after.data - scene.before.data)
    limit = float(np.percentile(change[scene.mask], 99))
    return limit if limit > 0 else float(change.max())


def draw_difference(scene: Scene) -> bytes:
    """Harmonized minus original on a symmetric diverging scale, the brain mask outlined."""
    change = scene.after.data.astype(np.float64) - scene.before.data
    limit = difference_limit(scene) or 1.0
    layout = scene.layout

    def paint(plane: geo.Plane, index: int) -> mos.Rgb:
        image = mos.slice_pixels(change, layout, plane, index)
        return mos.colours(image, (-limit, limit), DIFFERENCE_MAP)

    picture = mos.compose(layout, paint, [(scene.mask, "black")], light=True)
    label = f"change of {scene.units}"
    return mos.render(picture, bar=((-limit, limit), DIFFERENCE_MAP, label), quality=70)


def draw_bias(scene: Scene) -> bytes:
    """Bias field within the brain mask, in colour over the dimmed scan.

    Raises
    ------
    ValueError
        If the scene has no bias field.
    """
    if scene.bias is None:
        raise ValueError("the scene has no bias field")
    field, layout = scene.bias, scene.layout
    low, high = (float(v) for v in np.percentile(field[scene.mask], (0.5, 99.5)))
    if not high > low:
        low, high = low - 0.01, high + 0.01
    under = _grey_paint(scene, scene.before.data)

    def paint(plane: geo.Plane, index: int) -> mos.Rgb:
        inside = mos.slice_pixels(scene.mask, layout, plane, index)[..., None] > 0.5
        image = mos.slice_pixels(field, layout, plane, index)
        return np.where(inside, mos.colours(image, (low, high), BIAS_MAP), under(plane, index) / 2)

    picture = mos.compose(layout, paint)
    return mos.render(picture, bar=((low, high), BIAS_MAP, "bias field (ratio)"), quality=70)


def draw_registration(registration: Registration, *, columns: int = 5) -> tuple[bytes, bytes]:
    """Template and scan on the template's grid, the template's brain outlined on both."""
    template = geo.display_volume(registration.template, registration.affine)
    scan = geo.display_volume(registration.scan, registration.affine)
    mask = _template_mask(registration)
    layout = mos.plan_layout(template, mask, columns=columns, width=WIDTH)

    def draw(volume: FloatArray) -> bytes:
        window = common_window(volume, volume, mask)

        def paint(plane: geo.Plane, index: int) -> mos.Rgb:
            return mos.grey(mos.slice_pixels(volume, layout, plane, index), window)

        picture = mos.compose(layout, paint, [(mask, TEMPLATE_COLOUR)])
        return mos.render(picture, quality=70)

    return draw(template.data), draw(scan.data)


def _template_mask(registration: Registration) -> geo.BoolArray:
    """Template's brain mask in RAS+, or what Otsu's threshold calls bright."""
    if registration.template_mask is not None and registration.template_mask.any():
        mask = geo.display_volume(registration.template_mask, registration.affine)
        return mask.data.astype(bool)
    data = geo.display_volume(registration.template, registration.affine).data
    return np.asarray(data > threshold_otsu(data))


def density(values: FloatArray, edges: FloatArray) -> NDArray[np.float64]:
    """Probability density of `values` (or of their quantiles) per bin of `edges`.

    Smoothed with a Gaussian of one bin.
    """
    even = np.quantile(values, np.linspace(0.0, 1.0, 20001))
    counts = np.histogram(even, bins=edges)[0]
    return np.asarray(gaussian_filter1d(counts / (even.size * np.diff(edges)), 1.0))


def draw_histogram(histogram: Histogram, units: str) -> bytes:
    """Density of in-brain intensities before, after and in the reference domain, as PNG."""
    samples = [histogram.before, histogram.after]
    if histogram.reference is not None:
        samples.append(histogram.reference)
    low = min(float(np.quantile(s, 0.001)) for s in samples)
    high = max(float(np.quantile(s, 0.998)) for s in samples)
    edges = np.linspace(low, high if high > low else low + 1.0, 121)
    centres = (edges[1:] + edges[:-1]) / 2
    figure = Figure(figsize=(9.0, 3.4), dpi=120, facecolor="white", layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if histogram.reference is not None:
        curve = density(histogram.reference, edges)
        axes.fill_between(centres, curve, color="0.82", label="reference domain")
        axes.plot(centres, curve, color="0.45", lw=1)
    axes.plot(
        centres, density(histogram.before, edges), "--", color="#d55e00", lw=2, label="before"
    )
    axes.plot(centres, density(histogram.after, edges), "-", color="#0072b2", lw=2, label="after")
    axes.set(ylabel="density of brain voxels", xlim=(edges[0], edges[-1]))
    axes.set_xlabel(units, parse_math=False)
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    picture.quantize(64, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()

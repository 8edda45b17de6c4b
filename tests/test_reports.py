"""The participant page: truthful pictures, self-contained and safe HTML."""

from __future__ import annotations

import base64
import io
import itertools
import re
from dataclasses import replace
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from bids_harmony.errors import OutputError, ScanError
from bids_harmony.reports import figures as fig
from bids_harmony.reports import geometry as geo
from bids_harmony.reports import mosaic as mos
from bids_harmony.reports import page
from bids_harmony.reports.inputs import Histogram, Metric, Registration, ScanReport, Step

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)> & {{ 7*7 }}"
VOID = {"img", "meta", "input", "br", "hr", "link"}
SHAPE = (30, 36, 24)


def ball(shape=SHAPE, spacing=(2.0, 2.0, 2.0)):
    """Volume, mask and RAS affine of an ellipsoid head with a bright core and a dark rim."""
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    half = [n * mm / 2 for n, mm in zip(shape, spacing, strict=True)]
    radius = np.sqrt(sum((g / (0.8 * h)) ** 2 for g, h in zip(grid, half, strict=True)))
    volume = np.clip(1.3 - radius, 0, None).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = [a[0] for a in axes]
    return volume, radius < 0.9, affine


@pytest.fixture(scope="module")
def report():
    """A scan with everything a report can show."""
    volume, mask, affine = ball()
    after = np.where(mask, volume * 0.8, volume).astype(np.float32)
    quantiles = np.quantile(after[mask], np.linspace(0, 1, 101))
    return ScanReport(
        stem="sub-01_ses-1_T1w",
        desc="harmonizedNyul",
        modality="T1w",
        input_name="sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz",
        method="nyul",
        method_title="Piecewise-linear standardization",
        model_name="siteB-T1w",
        model_hash="3f7a",
        reference="siteB, T1w",
        site="siteA",
        site_source="participants.tsv",
        affine=affine,
        before=volume,
        after=after,
        mask=mask,
        bias=1 + 0.1 * volume,
        registration=Registration(volume, after, affine, mask, "MNI152NLin2009aSym"),
        histogram=Histogram(volume[mask], after[mask], quantiles),
        steps=(Step("brain mask", "taken over", "fMRIPrep", None, "reused: fmriprep"),),
        metrics=(
            Metric("distance", 0.2, 0.1, good="lower"),
            Metric("contrast", 1.5, 1.2, good="higher"),
            Metric("volume", 1400.0, 1400.0, "ml"),
        ),
        warnings=("Values above the trained range.",),
        methods="# Harmonization\n\nText <i>one</i>.\n\n- item",
        citations=(
            "A. Title. https://doi.org/10.1002/(SICI)1522-2594(199912)42:6<1072::AID>3.0.",
        ),
        sidecar={"Site": "siteA"},
    )


@pytest.fixture(scope="module")
def fragment(report):
    return page.render_fragment(report)


class Checker(HTMLParser):
    """Balanced tags, and everything a page may load."""

    def __init__(self):
        super().__init__()
        self.open, self.images, self.tags, self.ids, self.loads = [], [], [], [], []
        self.attributes = set()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.tags.append(tag)
        self.attributes |= set(values)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.images.append(values)
        if "id" in values:
            self.ids.append(values["id"])
        self.loads += [v for k, v in attrs if k in {"src", "srcset", "data", "poster"}]

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def check(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    return checker


def full_page(*fragments, **kwargs):
    return page.render_page("01", fragments, version="1.2.3", **kwargs)


def picture(data):
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


# ---------------------------------------------------------------- HTML


def test_page_is_self_contained_and_balanced(fragment):
    html = full_page(fragment, page.render_failure("sub-01_T2w", "no mask"), methods="M")
    found = check(html)
    assert len(found.images) == 8
    assert found.loads
    assert all(
        v.startswith(("data:image/jpeg;base64,", "data:image/png;base64,")) for v in found.loads
    )
    assert not {"script", "link", "iframe", "object", "embed"} & set(found.tags)
    assert not re.search(r"@import|url\(", html)
    assert "default-src 'none'" in html
    assert len(found.ids) == len(set(found.ids))
    for name in re.findall(r'(?:href="#|for="|aria-labelledby=")([^"]+)"', html):
        assert name in found.ids


def test_pictures_decode_and_have_alternative_texts(fragment):
    images = check(fragment).images
    alts = [image["alt"] for image in images]
    assert all(len(alt) > 20 for alt in alts)
    assert len(set(alts)) == len(alts)
    for image in images:
        data = base64.b64decode(image["src"].split(",", 1)[1], validate=True)
        assert min(Image.open(io.BytesIO(data)).size) > 100


def test_tables_have_header_cells_and_captions(fragment):
    html = full_page(fragment)
    tables = re.findall(r"<table.*?</table>", html, re.S)
    assert len(tables) == 5
    for table in tables:
        assert "<caption" in table
        assert 'scope="' in table


def test_same_input_gives_the_same_bytes(report, fragment):
    again = page.render_fragment(replace(report, sidecar=dict(report.sidecar)))
    assert again == fragment
    failure = page.render_failure("sub-01_T2w", "no mask")
    assert full_page(fragment, failure) == full_page(failure, fragment)


def test_hostile_strings_are_escaped(report):
    bad = replace(
        report,
        site=HOSTILE,
        site_source=HOSTILE,
        stem="sub-01_T1w",
        warnings=(HOSTILE,),
        errors=(HOSTILE,),
        methods=f"# {HOSTILE}\n\n- {HOSTILE}\n\n{HOSTILE} https://doi.org/10.1/a",
        citations=(HOSTILE,),
        metrics=(Metric(HOSTILE, 1, 2, HOSTILE, HOSTILE, "lower"),),
        bias=None,
        registration=None,
        sidecar={HOSTILE: HOSTILE, "x": {"</pre></details></section>": 1}},
    )
    section = page.render_fragment(bad)
    failure = page.render_failure(HOSTILE, HOSTILE, HOSTILE, site=HOSTILE, method=HOSTILE)
    html = full_page(section, failure, command_line=HOSTILE, errors=[HOSTILE], dataset=HOSTILE)
    found = check(html)
    assert "script" not in found.tags
    assert "onerror" not in found.attributes
    assert len(found.images) == 5
    assert "{{ 7*7 }}" in html
    rows = {page.summary_row(section).site, page.summary_row(failure).site}
    assert rows == {HOSTILE}
    assert page.summary_row(failure).stem == HOSTILE
    assert re.fullmatch(r"[A-Za-z0-9_-]+", page.summary_row(failure).anchor)


def test_summary_counts_and_links(fragment):
    row = page.summary_row(fragment)
    assert (row.status, row.site, row.warnings, row.errors, row.worse) == (
        "harmonized", "siteA", 1, 0, 1,
    )  # fmt: skip
    refused = page.render_failure("sub-01_FLAIR", "no FLAIR", status="refused", method="nyul")
    html = full_page(fragment, refused)
    assert "1 of 2 scans harmonized." in html
    assert f'href="#{row.anchor}"' in html
    assert "Refused: this scan was not harmonized" in html
    assert html.index(">sub-01_FLAIR</a>") < html.index(">sub-01_ses-1_T1w</a>")


def test_a_scan_with_two_outputs_counts_once(fragment):
    again = page.render_failure("sub-01_ses-1_T1w", "no memory", desc="other")
    html = full_page(fragment, again)
    assert "1 of 1 scan harmonized." in html
    named = page.summary_row(fragment).desc
    assert named
    assert f"<td>desc-{named}</td>" in html
    assert "<td>desc-other</td>" in html
    older = fragment.replace(f' data-desc="{named}"', "")
    assert older != fragment
    assert page.summary_row(older).desc == ""
    assert "<td>n/a</td>" in full_page(older)


def test_worse_is_said_in_words(fragment):
    table = re.search(r'<caption class="hidden">Metrics before.*?</table>', fragment, re.S)[0]
    assert re.search(r'class="worse"><th scope="row">contrast.*?</span> worse</span>', table)
    assert re.search(r'class="better"><th scope="row">distance.*?</span> better</span>', table)
    assert "Worse after harmonization:</span> contrast." in fragment


@pytest.mark.parametrize(
    ("metric", "word"),
    [
        (Metric("a", 1.0, 2.0, good="lower"), "worse"),
        (Metric("a", 1.0, 2.0, good="higher"), "better"),
        (Metric("a", 2.0, 1.0, good="lower"), "better"),
        (Metric("a", 2.0, 1.0, good="higher"), "worse"),
        (Metric("a", 1.0, 1.00001, good="lower"), "unchanged"),
        (Metric("a", 1.0, 2.0), ""),
        (Metric("a", None, 2.0, good="lower"), "n/a"),
        (Metric("a", 1.0, float("nan"), good="lower"), "n/a"),
    ],
)
def test_verdict(metric, word):
    assert page.verdict(metric) == word


def test_failure_shows_message_and_end_of_log():
    log = "\n".join(f"line {i}" for i in range(200))
    html = page.render_failure("sub-01_T1w", "empty mask; give one", log)
    check(html)
    assert "empty mask; give one" in html
    assert "line 199" in html
    assert "line 139\n" not in html
    assert page.summary_row(html).status == "failed"


def test_missing_material_is_said(report):
    html = page.render_fragment(replace(report, bias=None, registration=None, histogram=None))
    assert len(check(html).images) == 4
    assert "not registered to a template" in html
    assert "No bias field" in html
    assert "No intensity curves" in html


@pytest.mark.parametrize("cut", [lambda t: t[: len(t) // 2], lambda t: "", lambda t: t[200:]])
def test_damaged_fragment_is_refused(cut):
    whole = page.render_failure("sub-01_T1w", "bad", "log\n" * 50)
    with pytest.raises(OutputError, match="damaged"):
        full_page(cut(whole))


def test_boilerplate_structure_and_doi_links(fragment):
    assert "<h4>Harmonization</h4>" in fragment
    assert "<p>Text &lt;i&gt;one&lt;/i&gt;.</p>" in fragment
    assert "<li>item</li>" in fragment
    link = "https://doi.org/10.1002/(SICI)1522-2594(199912)42:6&lt;1072::AID&gt;3.0"
    assert f'<a href="{link}" rel="noreferrer">{link}</a>.' in fragment


def test_anchors_differ_for_different_names():
    names = ["sub-01_T1w", "sub-01+T1w", "sub-01 T1w", "sub-01/T1w"]
    assert len({page.anchor(n) for n in names}) == 4
    assert page.anchor("sub-01_T1w", "a") != page.anchor("sub-01_T1w", "b")


# ---------------------------------------------------------------- inputs


def test_untruthful_input_is_refused(report):
    broken = report.after.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(ScanError, match="not finite"):
        replace(report, after=broken)
    with pytest.raises(ScanError, match="share one grid"):
        replace(report, after=report.after[1:])
    with pytest.raises(ScanError, match="mask is empty"):
        replace(report, mask=np.zeros(SHAPE, bool))
    with pytest.raises(ScanError, match="singular"):
        replace(report, affine=np.diag([1.0, 1.0, 0.0, 1.0]))
    with pytest.raises(ScanError, match="no width"):
        replace(report, window=(1.0, 1.0))
    with pytest.raises(ScanError, match="histogram after"):
        Histogram(np.arange(3.0), np.array([1.0, np.inf]))


# ---------------------------------------------------------------- geometry

ORIENTATIONS = [
    "".join(pair[flip] for pair, flip in zip(order, flips, strict=True))
    for order in itertools.permutations(["LR", "PA", "IS"])
    for flips in itertools.product((0, 1), repeat=3)
]


@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_letters_name_the_right_side_in_all_48_orientations(codes):
    """A beacon at the patient's left, front and top must lie at the side so lettered."""
    shape, spacing = (20, 24, 16), (2.0, 2.0, 3.0)
    volume, mask, affine = ball(shape, spacing)
    volume[:] = np.where(mask, 0.1, 0.0)
    volume[5, 15, 11] = 1.0  # x < 0, y > 0, z > 0 of the centre
    axcodes2ornt = nib.orientations.axcodes2ornt
    turn = nib.orientations.ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
    turned = nib.orientations.apply_orientation(volume, turn)
    turned_affine = affine @ nib.orientations.inv_ornt_aff(turn, shape)
    assert nib.aff2axcodes(turned_affine) == tuple(codes)

    shown = geo.display_volume(turned, turned_affine)
    np.testing.assert_array_equal(shown.data, volume)
    np.testing.assert_allclose(shown.affine, affine, atol=1e-12)
    assert shown.spacing == pytest.approx(spacing)

    seen = {"axial": (11, "L", "A"), "coronal": (15, "L", "S"), "sagittal": (5, "A", "S")}
    for plane, (index, beside, above) in seen.items():
        image = geo.take_slice(shown.data, plane, index)
        row, column = np.unravel_index(np.argmax(image), image.shape)
        left, right, top, bottom = geo.EDGES[plane]
        assert (left, right)[int(column > (image.shape[1] - 1) / 2)] == beside
        assert (top, bottom)[int(row > (image.shape[0] - 1) / 2)] == above


def test_letters_in_the_drawn_picture_stand_beside_the_beacon():
    """Pixels of the encoded picture: the bright left half is the half lettered L."""
    volume, mask, affine = ball()
    volume[: SHAPE[0] // 2] *= 3  # patient's left is bright
    flipped, flipped_affine = volume[::-1], affine @ np.diag([-1.0, 1, 1, 1])
    flipped_affine[:3, 3] = affine[:3, 3] + affine[:3, 0] * (SHAPE[0] - 1)
    shown = geo.display_volume(flipped, flipped_affine)
    layout = mos.plan_layout(shown, mask, columns=1, width=300)

    def paint(plane, index):
        return mos.grey(mos.slice_pixels(shown.data, layout, plane, index), (0.0, 4.0))

    drawn = mos.compose(layout, paint)
    left = next(t for t in drawn.texts if t.word == "L")
    right = next(t for t in drawn.texts if t.word == "R")
    pixels = picture(mos.render(drawn, quality=95)).mean(axis=2)
    height = int(SHAPE[1] * 2.0 / layout.mm_per_pixel)
    bright = pixels[height // 4 : height // 2]
    near = bright[:, int(left.column) + 40].mean(), bright[:, int(right.column) - 40].mean()
    assert left.column < right.column
    assert near[0] > 2 * near[1] > 0


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 5.0), (5.0, 1.0, 1.0), (0.5, 2.0, 1.0)])
def test_proportions_are_true_for_anisotropic_voxels(spacing):
    """A 60 mm sphere must be drawn round in every plane."""
    shape = tuple(round(90 / mm) for mm in spacing)
    axes = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(shape, spacing, strict=True)]
    grid = np.meshgrid(*axes, indexing="ij")
    depth = 30 - np.sqrt(sum(g**2 for g in grid))  # 0 on the surface, linear across it
    shown = geo.display_volume(depth, np.diag([*spacing, 1.0]))
    layout = mos.plan_layout(shown, depth > 0, columns=1, width=300)
    layout = replace(layout, box=tuple(slice(0, n) for n in shape))
    for plane in geo.PLANES:
        middle = shape[geo.NORMAL[plane]] // 2
        disc = mos.slice_pixels(shown.data, layout, plane, middle) > 0
        tall, wide = disc.any(axis=1).sum(), disc.any(axis=0).sum()
        assert tall == pytest.approx(60 / layout.mm_per_pixel, rel=0.02)
        assert wide == pytest.approx(60 / layout.mm_per_pixel, rel=0.02)


def test_slices_go_through_the_brain_and_know_their_place():
    volume, mask, _ = ball()
    for axis in range(3):
        first, last = geo.extent(mask, axis)
        chosen = geo.choose_slices(mask, axis, 5)
        assert len(chosen) == 5
        assert first <= chosen[0] < chosen[-1] <= last
        assert abs((chosen[0] - first) - (last - chosen[-1])) <= 1
    thin = np.zeros((10, 10, 3), bool)
    thin[2:8, 2:8, 1] = True
    assert geo.choose_slices(thin, 2, 5) == [1]
    box = geo.head_box(volume, mask, (2.0, 2.0, 2.0))
    oblique = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0, 0) * 2.0, [5, 6, 7])
    centre = [(s.start + s.stop - 1) / 2 for s in box[:2]]
    expected = nib.affines.apply_affine(oblique, [*centre, 4])[2]
    assert geo.slice_millimetres(oblique, 2, 4, box) == pytest.approx(expected)
    assert geo.obliquity_degrees(oblique) == pytest.approx(np.rad2deg(0.2), rel=1e-3)


def test_crop_keeps_the_brain_and_cuts_the_neck():
    volume = np.zeros((40, 40, 80), np.float32)
    volume[10:30, 10:30, :70] = 1.0  # neck down to the lowest slice
    mask = np.zeros(volume.shape, bool)
    mask[12:28, 12:28, 50:68] = True
    box = geo.head_box(volume, mask, (2.0, 2.0, 2.0), reach_mm=20.0, margin_mm=4.0)
    assert [(s.start, s.stop) for s in box] == [(8, 32), (8, 32), (38, 72)]


# ---------------------------------------------------------------- grey levels and colours


def grey_levels(data, scene):
    """Mean grey of the middle of the first axial slice."""
    _, indices = scene.layout.slices[0]
    tile = mos.slice_pixels(scene.mask, scene.layout, "axial", indices[0])
    start = mos.row_starts(len(indices), tile.shape[1], scene.layout.width)[0]
    row, column = tile.shape[0] // 2, start + tile.shape[1] // 2
    return picture(data)[row - 3 : row + 4, column - 3 : column + 4].mean()


def test_before_and_after_share_one_window(report):
    """Constant brains of 0.4 and 0.8 in a window 0..1 are drawn with 102 and 204."""
    _, mask, _ = ball()
    flat = replace(
        report,
        before=np.where(mask, 0.4, 0).astype(np.float32),
        after=np.where(mask, 0.8, 0).astype(np.float32),
        window=(0.0, 1.0),
    )
    scene = fig.make_scene(flat)
    assert grey_levels(fig.draw_before(scene), scene) == pytest.approx(102, abs=2)
    assert grey_levels(fig.draw_after(scene), scene) == pytest.approx(204, abs=2)


def test_window_is_chosen_from_the_target_not_from_the_scan(fragment):
    rng = np.random.default_rng(1)
    mask = np.ones((10, 10, 10), bool)
    after = rng.uniform(0, 1, mask.shape)
    reference = np.linspace(0, 2, 201)
    assert fig.common_window(after * 9, after, mask)[1] == np.percentile(after, 99.5)
    assert fig.common_window(after, after, mask, reference) == (0.0, pytest.approx(1.99))
    assert fig.common_window(after, after - 0.5, mask)[0] < -0.45
    low, high = fig.common_window(after, np.zeros_like(after), mask)
    assert low < high
    assert fig.saturated_share(after, mask, (0.0, 0.75)) == np.mean(after > 0.75)
    assert "brighter than white: " in fragment


def test_difference_is_red_where_brighter_and_white_where_equal(report):
    scene = fig.make_scene(report)
    up = replace(scene, after=replace(scene.after, data=scene.before.data + scene.mask))
    down = replace(scene, after=replace(scene.after, data=scene.before.data - scene.mask))
    same = replace(scene, after=scene.before)
    row = slice(60, 100)
    red, blue, white = (picture(fig.draw_difference(s)) for s in (up, down, same))
    centre = (row, slice(70, 80))
    assert red[centre][..., 0].mean() > red[centre][..., 2].mean() + 50
    assert blue[centre][..., 2].mean() > blue[centre][..., 0].mean() + 50
    assert np.ptp(white[centre].reshape(-1, 3).mean(axis=0)) < 6
    assert fig.difference_limit(up) == pytest.approx(1.0, abs=1e-5)
    assert fig.difference_limit(same) == 0.0


def test_nothing_changed_is_said(report):
    still = replace(report, after=report.before, bias=None, registration=None, histogram=None)
    assert "after equals before" in page.render_fragment(still)


def test_density_integrates_to_one_and_accepts_quantiles():
    rng = np.random.default_rng(0)
    values = rng.normal(0.5, 0.1, 200_000)
    edges = np.linspace(0, 1, 101)
    from_values = fig.density(values, edges)
    from_quantiles = fig.density(np.quantile(values, np.linspace(0, 1, 201)), edges)
    assert np.sum(from_values) * 0.01 == pytest.approx(1, abs=0.01)
    centres = (edges[1:] + edges[:-1]) / 2
    truth = np.exp(-((centres - 0.5) ** 2) / 0.02) / (0.1 * np.sqrt(2 * np.pi))
    np.testing.assert_allclose(from_values, truth, atol=0.12)
    np.testing.assert_allclose(from_quantiles, truth, atol=0.25)


def test_outlines_are_drawn_on_the_mask(report):
    scene = fig.make_scene(report)
    drawn = picture(fig.draw_mask(scene))
    orange = (drawn[..., 0] > 170) & (drawn[..., 2] < 110) & (drawn[..., 1] > 90)
    assert orange.sum() > 500
    plain = picture(fig.draw_before(scene))
    assert np.ptp(plain, axis=2).max() < 12  # grey only


def test_registration_pictures_share_slices_and_outline(report):
    template, scan = (picture(p) for p in fig.draw_registration(report.registration))
    assert template.shape == scan.shape
    blue = [(p[..., 2] > p[..., 0] + 60) for p in (template, scan)]
    assert blue[0].sum() > 300
    assert np.mean(blue[0] == blue[1]) > 0.99
    guessed = replace(report.registration, template_mask=None)
    assert len(fig.draw_registration(guessed)) == 2


def test_bias_needs_a_field(report):
    scene = fig.make_scene(replace(report, bias=None))
    with pytest.raises(ValueError, match="no bias field"):
        fig.draw_bias(scene)


@pytest.mark.parametrize("shape", [(30, 36, 1), (1, 36, 24), (3, 3, 3)])
def test_thin_and_tiny_volumes_are_drawn(report, shape):
    volume = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(shape)
    mask = np.zeros(shape, bool)
    mask[tuple(n // 2 for n in shape)] = True
    thin = replace(
        report, before=volume, after=volume / 2, mask=mask, bias=volume + 1,
        units=r"$\broken{ $", affine=np.diag([1.0, 1.0, 5.0, 1.0]),
    )  # fmt: skip
    assert len(check(page.render_fragment(replace(thin, registration=None))).images) == 6


def test_fragment_stays_small(fragment):
    assert len(fragment) < 1_500_000

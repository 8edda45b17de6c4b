"""Outputs: atomic, reproducible, never half written, and clear when they cannot be written."""

from __future__ import annotations

import errno
import gzip
import json
import multiprocessing
import os
import subprocess
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from bids_harmony.bids import write
from bids_harmony.bids.write import (
    atomic_file,
    atomic_write_bytes,
    atomic_write_text,
    save_nifti,
    write_json,
    write_tsv,
)
from bids_harmony.errors import ExitCode, OutputError

AFFINE = np.array([[0, 0, -1.2, 30], [0.9, 0.1, 0, -40], [-0.1, 0.9, 0, 5], [0, 0, 0, 1]])


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((12, 13, 14), dtype=np.float32)


def test_text_is_skipped_when_identical(tmp_path):
    path = tmp_path / "a/b.txt"
    assert atomic_write_text(path, "grüß") is True
    before = path.stat().st_ino
    assert atomic_write_text(path, "grüß") is False
    assert path.stat().st_ino == before
    assert atomic_write_bytes(path, b"other") is True
    assert path.read_bytes() == b"other"
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


def test_failure_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(TypeError, match="bytes"), atomic_file(path) as stream:
        stream.writelines([b"new", "not bytes"])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_file_mode_follows_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_json(tmp_path):
    path = tmp_path / "a.json"
    content = {"b": np.float32(0.5), "a": np.array([1, 2]), "c": Path("x/y"), "d": "ü"}
    assert write_json(path, content)
    assert json.loads(path.read_text()) == {"a": [1, 2], "b": 0.5, "c": "x/y", "d": "ü"}
    assert path.read_text().index('"a"') < path.read_text().index('"b"')
    assert path.read_text().endswith("}\n")
    assert not write_json(path, dict(reversed(content.items())))
    for bad in (np.nan, np.float32(np.inf), np.array([1.0, np.nan])):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"a": bad})
    with pytest.raises(TypeError, match="cannot be written as JSON"):
        write_json(path, {"a": object()})


def test_tsv(tmp_path):
    path = tmp_path / "a.tsv"
    rows = [
        {"id": "01", "x": np.float64(1 / 3)},
        {"id": "a\tb\n", "y": None, "x": np.nan},
        {"n": 7},
    ]
    write_tsv(path, rows)
    assert path.read_text() == (
        "id\tx\ty\tn\n01\t0.3333333\tn/a\tn/a\na b\tn/a\tn/a\tn/a\nn/a\tn/a\tn/a\t7\n"
    )
    write_tsv(path, rows, ["x"])
    assert path.read_text() == "x\n0.3333333\nn/a\nn/a\n"
    write_tsv(path, [], ["x", "y"])
    assert path.read_text() == "x\ty\n"


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii"])
def test_nifti_round_trip(tmp_path, name):
    data = volume()
    save_nifti(data, AFFINE, tmp_path / name)
    image = nib.load(tmp_path / name)
    assert image.get_data_dtype() == np.float32
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), data)
    np.testing.assert_allclose(image.affine, AFFINE, atol=1e-5)
    qform, q_code = image.header.get_qform(coded=True)
    assert q_code == int(image.header["sform_code"]) == 1
    assert image.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_allclose(qform, image.affine, atol=1e-4)


def test_forms_are_the_same_for_every_right_angled_affine(tmp_path):
    rng = np.random.default_rng(1)
    for _ in range(10):
        rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
        affine = np.eye(4)
        affine[:3, :3] = rotation * [0.8, 1.1, 3.0]
        affine[:3, 3] = rng.normal(size=3) * 50
        header = nib.load(save_nifti(volume(), affine, tmp_path / "a.nii")).header
        np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_itk_reads_the_same_place(tmp_path):
    """ITK prefers the qform and nibabel the sform; what we write means the same to both."""
    ants = pytest.importorskip("ants")
    path = save_nifti(volume(), AFFINE, tmp_path / "a.nii.gz")
    itk = ants.image_read(str(path))
    flip = np.diag([-1, -1, 1])
    np.testing.assert_allclose(flip @ np.array(itk.origin), AFFINE[:3, 3], atol=1e-4)
    axes = flip @ np.array(itk.direction) * np.array(itk.spacing)
    np.testing.assert_allclose(axes, AFFINE[:3, :3], atol=1e-4)
    np.testing.assert_array_equal(itk.numpy(), volume())


def test_nifti_bytes_are_reproducible(tmp_path):
    save_nifti(volume(), AFFINE, tmp_path / "a.nii.gz")
    save_nifti(volume(), AFFINE, tmp_path / "other.nii.gz")
    first = (tmp_path / "a.nii.gz").read_bytes()
    assert first == (tmp_path / "other.nii.gz").read_bytes()
    assert first[4:8] == b"\0\0\0\0"
    assert first[3] == 0, "no file name in the gzip header"
    assert len(gzip.decompress(first)) == 352 + volume().nbytes


def test_nifti_masks(tmp_path):
    mask = volume() > 0.5
    save_nifti(mask, AFFINE, tmp_path / "m.nii.gz", dtype=np.uint8)
    image = nib.load(tmp_path / "m.nii.gz")
    assert image.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asanyarray(image.dataobj), mask)
    save_nifti(mask.astype(np.float32), AFFINE, tmp_path / "m.nii.gz", dtype=np.uint8)
    for bad in (volume(), volume() - 300, np.full((3, 3, 3), 300)):
        with pytest.raises(ValueError, match="do not fit uint8"):
            save_nifti(bad, AFFINE, tmp_path / "m.nii.gz", dtype=np.uint8)


def test_nifti_keeps_the_code_of_the_source(tmp_path):
    header = nib.Nifti1Header()
    header.set_qform(AFFINE, 2)
    header["descrip"] = b"scanner text"
    save_nifti(volume(), AFFINE, tmp_path / "a.nii.gz", header=header)
    saved = nib.load(tmp_path / "a.nii.gz").header
    assert (int(saved["sform_code"]), int(saved["qform_code"])) == (2, 2)
    assert saved["descrip"].item() == b"scanner text"


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_is_never_written(tmp_path, bad):
    data = volume()
    data[1, 2, 3] = bad
    with pytest.raises(ValueError, match=r"a\.nii\.gz: 1 values are not finite"):
        save_nifti(data, AFFINE, tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="do not fit float32"):
        save_nifti(np.full((3, 3, 3), 1e300), AFFINE, tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match="affine is singular"):
        save_nifti(volume(), np.zeros((4, 4)), tmp_path / "a.nii.gz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "cure"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EROFS, "mount the output folder writable"),
        (errno.EACCES, "no permission"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "check the output folder"),
    ],
)
def test_errors_name_the_file_and_the_cure(tmp_path, monkeypatch, code, cure):
    def fail(*_args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(write.os, "fsync", fail)
    path = tmp_path / "a.nii.gz"
    with pytest.raises(OutputError, match=f"cannot write {path}: .*{cure}") as info:
        save_nifti(volume(), AFFINE, path)
    assert info.value.exit_code == ExitCode.CANNOT_CREATE
    assert list(tmp_path.iterdir()) == []


def test_parent_is_a_file(tmp_path):
    (tmp_path / "a").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        atomic_write_text(tmp_path / "a/b/c.txt", "x")


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 64 KiB; only root can have it."""
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk(tiny_disk):
    small = save_nifti(volume(), AFFINE, tiny_disk / "small.nii.gz")
    before = small.read_bytes()
    path = tiny_disk / "big.nii.gz"
    with pytest.raises(OutputError, match=r"big\.nii\.gz: No space left on device; free some"):
        save_nifti(np.random.default_rng(0).random((64, 64, 64), np.float32), AFFINE, path)
    assert [p.name for p in tiny_disk.iterdir()] == ["small.nii.gz"]
    assert small.read_bytes() == before


def test_read_only_file_system(tiny_disk):
    if subprocess.run(
        ["mount", "-o", "remount,ro", str(tiny_disk)], capture_output=True, check=False
    ).returncode:
        pytest.skip("cannot remount read-only here")
    with pytest.raises(OutputError, match="Read-only file system; the file system is read-only"):
        write_json(tiny_disk / "a.json", {})


def _write_often(path: Path, number: int) -> None:
    for round_ in range(15):
        write_json(path, {"writer": number, "round": round_, "filler": "x" * 20_000})


def test_eight_writers_never_leave_half_a_file(tmp_path):
    path = tmp_path / "shared.json"
    write_json(path, {"writer": -1})
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_often, args=(path, n)) for n in range(8)]
    for writer in writers:
        writer.start()
    reads = 0
    while any(writer.is_alive() for writer in writers):
        assert "writer" in json.loads(path.read_text())
        reads += 1
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0] * 8
    assert reads > 10
    assert list(tmp_path.iterdir()) == [path]

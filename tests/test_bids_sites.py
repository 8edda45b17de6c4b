"""Where the site of a scan comes from, source by source."""

from __future__ import annotations

from pathlib import Path

import pytest

from bids_harmony.bids.scan import Scan
from bids_harmony.bids.sites import SiteFinder, scanner_label, sidecar_label
from bids_harmony.errors import DatasetError, MissingInputError, ScanError, UsageError

SCANNER = {
    "Manufacturer": "Siemens",
    "ManufacturersModelName": "Prisma",
    "MagneticFieldStrength": 3,
    "StationName": "MR01",
    "InstitutionName": "Clinic",
}


def scan(root: Path, subject: str = "01", session: str | None = "1", **metadata) -> Scan:
    entities = {"sub": subject} | ({"ses": session} if session else {})
    stem = "_".join(f"{k}-{v}" for k, v in entities.items())
    folder = "/".join(f"{k}-{v}" for k, v in entities.items())
    return Scan(root / folder / "anat" / f"{stem}_T1w.nii.gz", entities, "T1w", metadata)


def table(path: Path, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(row.replace(" ", "\t") for row in rows) + "\n")
    return path


@pytest.fixture
def full(tmp_path) -> Path:
    """A data set in which every source names another site."""
    table(tmp_path / "participants.tsv", "participant_id site scanner", "sub-01 P Q")
    table(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id site", "ses-1 S", "ses-2 n/a")
    table(
        tmp_path / "sub-01/ses-1/sub-01_ses-1_scans.tsv",
        "filename site",
        "anat/sub-01_ses-1_T1w.nii.gz F",
    )
    return tmp_path


def test_order_of_sources(full):
    """Remove the strongest source one after the other."""
    one = scan(full, **SCANNER)
    assert SiteFinder(full).site(one) == ("F", "sub-01_ses-1_scans.tsv column site")
    (full / "sub-01/ses-1/sub-01_ses-1_scans.tsv").unlink()
    assert SiteFinder(full).site(one) == ("S", "sub-01_sessions.tsv column site")
    (full / "sub-01/sub-01_sessions.tsv").unlink()
    assert SiteFinder(full).site(one) == ("P", "participants.tsv column site")
    table(full / "participants.tsv", "participant_id Site scanner", "sub-01 n/a Q")
    assert SiteFinder(full).site(one) == ("Q", "participants.tsv column scanner")
    table(full / "participants.tsv", "participant_id site", "sub-02 X")
    assert SiteFinder(full).site(one) == ("Siemens Prisma 3T MR01", "sidecar scanner description")
    assert SiteFinder(full).site(scan(full)) == ("n/a", "nothing tells the site")


def test_empty_cells_fall_through(full):
    assert SiteFinder(full).site(scan(full, session="2"))[0] == "P"
    table(full / "sub-01/ses-1/sub-01_ses-1_scans.tsv", "filename site", "anat/x.nii.gz F")
    assert SiteFinder(full).site(scan(full))[0] == "S"
    table(full / "sub-01/sub-01_sessions.tsv", "session_id site", "ses-1")
    assert SiteFinder(full).site(scan(full))[0] == "P"


def test_labels_stay_text(tmp_path):
    table(tmp_path / "participants.tsv", "participant_id site", "sub-01 01", "02 1.0", "sub-03 NA")
    finder = SiteFinder(tmp_path)
    labels = [finder.site(scan(tmp_path, s, None))[0] for s in ("01", "02", "03", "04")]
    assert labels == ["01", "1.0", "NA", "n/a"]


def test_windows_table(tmp_path):
    text = "\ufeffparticipant_id\tsite\r\nsub-01\tA b \r\n"
    (tmp_path / "participants.tsv").write_bytes(text.encode())
    assert SiteFinder(tmp_path).site(scan(tmp_path))[0] == "A b"


def test_several_rows_need_a_session(tmp_path):
    path = table(
        tmp_path / "participants.tsv",
        "participant_id session_id site",
        "sub-01 ses-1 A",
        "sub-01 ses-2 B",
        "sub-02 n/a C",
    )
    finder = SiteFinder(tmp_path)
    assert finder.site(scan(tmp_path, session="2"))[0] == "B"
    assert finder.site(scan(tmp_path, "02", "9"))[0] == "C"
    assert finder.site(scan(tmp_path, session="3"))[0] == "n/a"
    table(path, "participant_id site", "sub-01 A", "sub-01 B", "sub-02 C", "sub-02 C")
    with pytest.raises(ScanError, match=r"sub-01_ses-1_T1w has several values of 'site' \(A, B\)"):
        SiteFinder(tmp_path).site(scan(tmp_path))
    assert SiteFinder(tmp_path).site(scan(tmp_path, "02"))[0] == "C"


def test_site_from_column(full):
    table(full / "participants.tsv", "participant_id site centre", "sub-01 P C", "sub-02 P n/a")
    finder = SiteFinder(full, "centre")
    assert finder.site(scan(full)) == ("C", "participants.tsv column centre (--site-from)")
    assert finder.site(scan(full, "02")) == ("P", "participants.tsv column site")
    finder.check_used()
    wrong = SiteFinder(full, "center")
    wrong.site(scan(full))
    with pytest.raises(UsageError, match=r"--site-from center: no .* there is centre, filename"):
        wrong.check_used()


def test_site_from_sidecar(full):
    finder = SiteFinder(full, "sidecar:InstitutionName, MagneticFieldStrength")
    told = "sidecar InstitutionName, MagneticFieldStrength (--site-from)"
    assert finder.site(scan(full, **SCANNER)) == ("Clinic 3T", told)
    assert finder.site(scan(full))[0] == "F"
    finder.check_used()
    with pytest.raises(UsageError, match="names no key"):
        SiteFinder(full, "sidecar:,")


def test_site_from_table(full, tmp_path):
    path = table(
        tmp_path / "my.tsv", "participant_id session_id site", "01 1 T1", "sub-01 n/a T", "02 1 U"
    )
    finder = SiteFinder(full, str(path))
    assert finder.site(scan(full)) == ("T1", "my.tsv column site (--site-from)")
    assert finder.site(scan(full, session="2"))[0] == "T"
    assert finder.site(scan(full, session=None))[0] == "T"
    with pytest.raises(MissingInputError, match=r"none\.tsv does not exist"):
        SiteFinder(full, str(tmp_path / "none.tsv"))
    table(path, "subject site", "01 A")
    with pytest.raises(UsageError, match="needs the columns participant_id and site"):
        SiteFinder(full, str(path))
    with pytest.raises(UsageError, match="--site-from is empty"):
        SiteFinder(full, " ")


def test_scanner_label():
    assert scanner_label(SCANNER) == "Siemens Prisma 3T MR01"
    assert scanner_label(SCANNER | {"StationName": "n/a"}) == "Siemens Prisma 3T Clinic"
    assert scanner_label({"Manufacturer": " GE  MR "}) == "GE MR"
    # The field strength alone is shared by scanners that have nothing else in common.
    assert scanner_label({"MagneticFieldStrength": 3.0}) is None
    assert scanner_label({"Manufacturer": ["a"], "StationName": None}) is None
    assert sidecar_label({"MagneticFieldStrength": 2.89}, ("MagneticFieldStrength",)) == "2.89T"


def test_unreadable_tables(tmp_path):
    path = tmp_path / "participants.tsv"
    path.symlink_to("gone")
    with pytest.raises(DatasetError, match="datalad get"):
        SiteFinder(tmp_path).site(scan(tmp_path))
    path.unlink()
    path.write_bytes(b"participant_id\tsite\nsub-01\t\xff\n")
    with pytest.raises(DatasetError, match="repair the table"):
        SiteFinder(tmp_path).site(scan(tmp_path))
    path.write_bytes(b"")
    assert SiteFinder(tmp_path).site(scan(tmp_path))[0] == "n/a"


def test_long_table_is_read_once(tmp_path, monkeypatch):
    rows = [f"sub-{i} " + "x " * 20 + f"S{i % 7}" for i in range(100_000)]
    header = "participant_id " + " ".join(f"c{i}" for i in range(20)) + " site"
    table(tmp_path / "participants.tsv", header, *rows)
    reads: list[Path] = []
    real = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda p, **k: (reads.append(p), real(p, **k))[1])
    finder = SiteFinder(tmp_path)
    labels = [finder.site(scan(tmp_path, str(i), None))[0] for i in range(0, 100_000, 500)]
    assert labels == [f"S{i % 7}" for i in range(0, 100_000, 500)]
    assert reads.count(tmp_path / "participants.tsv") == 1

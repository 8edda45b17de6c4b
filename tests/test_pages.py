"""When a participant's page is written, and what happens when it cannot be."""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from bids_harmony.cli import outputs
from bids_harmony.cli.outputs import Pages
from bids_harmony.errors import OutputError
from bids_harmony.workflows.cohort import Outcome


@pytest.fixture
def pages(tmp_path):
    """Pages of a run over two scans of one participant and one of another."""
    config = SimpleNamespace(out_dir=tmp_path / "out", desc="harmonized", bids_dir=tmp_path)
    target = SimpleNamespace(title="Nyul", text=lambda prep: "What was done.", citations=())
    scans = [
        SimpleNamespace(subject=subject, stem=f"sub-{subject}_ses-{session}_T1w", site="A")
        for subject, session in (("01", "1"), ("01", "2"), ("02", "1"))
    ]
    made = Pages(config, None, target, scans, [])
    return made, lambda subject: tmp_path / "out" / f"sub-{subject}.html"


def lost(subject, session):
    return Outcome(f"sub-{subject}_ses-{session}_T1w", subject, "failed", "no memory")


def test_a_page_is_written_after_the_last_scan_of_its_participant(pages):
    write, page = pages
    write(lost("01", 1))
    write(lost("01", 9))  # needed for an adaptation, not asked for
    write(lost("02", 1))
    assert not page("01").exists()
    assert page("02").is_file()
    write(lost("01", 2))
    assert "ses-2_T1w" in page("01").read_text()


def test_a_page_that_cannot_be_written_is_tried_again_at_the_end(pages, monkeypatch, caplog):
    write, page = pages
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "render_page", Mock(side_effect=OutputError("disk is full")))
        write(lost("02", 1))
        write(lost("01", 1))  # the other scan is never tried
        assert "its page waits for the end of the run: disk is full" in caplog.text
        with pytest.raises(OutputError, match="disk is full"):
            write.finish()
    write.finish()
    assert page("02").is_file()
    assert "ses-1_T1w" in page("01").read_text()

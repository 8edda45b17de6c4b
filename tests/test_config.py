"""Settings as a file: round trip, precedence, mistakes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from bids_harmony.cli.parser import parse_args
from bids_harmony.config import Config, read_config_file
from bids_harmony.errors import MissingInputError, UsageError

ARGV = ["/data/raw", "/data/out", "participant"]
MANY = [
    "--participant-label", "01", "02", "--session-label", "1", "--modality", "T1w", "FLAIR",
    "--bids-filter-file", "/f.json", "--derivatives", "a=/d", "--method", "nyul", "--reference",
    "A", "--site-from", "sidecar:StationName", "--desc", "x1", "--skull-strip", "force",
    "--output-spaces", "native", "MNI152NLin2009aSym:res-2", "--ignore", "bias-field",
    "--random-seed", "5", "--nprocs", "3", "--mem", "4G", "--device", "cpu", "--sloppy",
    "--no-clean-workdir", "--write-graph", "-vv", "-w", "/w",
]  # fmt: skip


def test_round_trip(tmp_path):
    config = parse_args([*ARGV, *MANY])
    path = tmp_path / "run.toml"
    path.write_text(config.to_toml())
    assert Config(**read_config_file(path)) == config
    assert parse_args([*ARGV, "--config-file", str(path)]) == config


def test_the_command_line_wins(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(parse_args([*ARGV, *MANY]).to_toml())
    argv = ["/else/raw", "/else/out", "participant", "--config_file", str(path)]
    config = parse_args([*argv, "--desc", "mine", "--clean-workdir", "--participant-label", "9"])
    assert (config.desc, config.clean_workdir, config.participant_label) == ("mine", True, ("9",))
    assert (config.bids_dir, config.out_dir) == (Path("/else/raw"), Path("/else/out"))
    assert (config.random_seed, config.skull_strip, config.work_dir) == (5, "force", Path("/w"))


def test_a_table_is_not_needed(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('random_seed = 4\nmodality = ["T2w"]\n')
    config = parse_args([*ARGV, "--config-file", str(path)])
    assert (config.random_seed, config.modality) == (4, ("T2w",))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = ", "cannot be read as TOML"),
        ("colour = 3", "unknown setting(s) colour"),
        ('participant_label = "01"', "participant_label must be a list of texts, not '01'"),
        ("participant_label = [1]", "participant_label must be a list of texts"),
        ('nprocs = "two"', "nprocs must be a whole number"),
        ("nprocs = true", "nprocs must be a whole number"),
        ("nprocs = 0", "nprocs = 0 is not positive"),
        ('sloppy = "yes"', "sloppy must be true or false"),
        ("desc = 4", "desc must be a text"),
        ('skull_strip = "maybe"', "is none of auto, skip, force"),
        ('method = "magic"', "method = 'magic' is none of"),
        ('modality = ["PET"]', "modality = 'PET' is none of"),
    ],
)
def test_mistakes_are_told(tmp_path, text, told):
    path = tmp_path / "bad.toml"
    path.write_text(text + "\n")
    with pytest.raises(UsageError) as caught:
        parse_args([*ARGV, "--config-file", str(path)])
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(MissingInputError, match="does not exist"):
        read_config_file(tmp_path / "none.toml")


def test_every_option_is_a_setting_and_the_reverse():
    from bids_harmony.cli.parser import build_parser

    options = {a.dest for a in build_parser()._actions} - {
        "help", "version", "bids_exec_spec", "config_file",
    }  # fmt: skip
    assert options == {f.name for f in dataclasses.fields(Config)}


def test_every_setting_is_read():
    """No option is parsed and ignored."""
    import bids_harmony

    root = Path(bids_harmony.__file__).parent
    code = "".join(
        p.read_text() for p in root.rglob("*.py") if p.name not in ("config.py", "boutiques.py")
    )
    for field in dataclasses.fields(Config):
        assert f"config.{field.name}" in code, field.name

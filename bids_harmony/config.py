"""Frozen settings of one run, and their TOML form."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bids_harmony.errors import MissingInputError, UsageError

DEFAULT_SEED = 20200220
DEFAULT_DESC = "harmonized"
DEFAULT_TEMPLATE = "MNI152NLin2009aSym"
DEFAULT_METHOD = "nyul"
DEFAULT_ADAPT = "site"
#: Logging level of what a user who waits for a long step wants to read, without asking for it.
PROGRESS = 25
#: Folder below OUT_DIR/models with adaptations to sites, which is therefore no name for a bundle.
ADAPTED = "adapted"
#: Scans of a site that a method adapts to. A scanner's appearance is common to its scans, so few
#: are enough and the cost does not grow with the site; one alone would also teach its anatomy.
ADAPT_SCANS = 4


@dataclass(frozen=True)
class Config:
    """Everything a run was asked to do; field names equal the long options."""

    bids_dir: Path
    out_dir: Path
    analysis_level: str
    work_dir: Path
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    modality: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    derivatives: tuple[str, ...] = ()
    method: str | None = None
    model: str | None = None
    name: str | None = None
    preset: str | None = None
    max_time: int | None = None
    method_option: tuple[str, ...] = ()
    adapt_to: str | None = None
    adapt: str | None = None
    adapt_scans: int | None = None
    adapt_segmentation: Path | None = None
    reference: str | None = None
    site_from: str | None = None
    desc: str = DEFAULT_DESC
    skull_strip: str = "auto"
    output_spaces: tuple[str, ...] = ("native",)
    ignore: tuple[str, ...] = ()
    level: str = "full"
    sloppy: bool = False
    random_seed: int = DEFAULT_SEED
    device: str = "auto"
    nprocs: int | None = None
    omp_nthreads: int | None = None
    mem: str | None = None
    use_plugin: Path | None = None
    clean_workdir: bool = True
    stop_on_first_crash: bool = False
    resource_monitor: bool = False
    write_graph: bool = False
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    debug: bool = False
    verbose: int = 0

    def to_toml(self) -> str:
        """TOML text with one table, ``[bids_harmony]``; unset options are left out."""
        import tomli_w

        table = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return tomli_w.dumps({"bids_harmony": {k: v for k, v in table.items() if v is not None}})


PATH_FIELDS = frozenset(
    {
        "bids_dir",
        "out_dir",
        "work_dir",
        "bids_filter_file",
        "bids_database_dir",
        "use_plugin",
        "adapt_segmentation",
    }
)

_KINDS = {f.name: str(f.type) for f in fields(Config)}
_TYPES: dict[str, type] = {
    "Path": str,
    "str": str,
    "bool": bool,
    "int": int,
    "tuple[str, ...]": tuple,
}


def read_config_file(path: Path) -> dict[str, Any]:
    """Settings in a TOML file that `Config.to_toml` (or a user) wrote.

    Raises
    ------
    MissingInputError
        If the file does not exist.
    UsageError
        If it is no TOML, names an unknown setting or holds a value of the wrong type.
    """
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError as error:
        raise MissingInputError(f"--config-file {path} does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"--config-file {path} cannot be read as TOML: {error}") from error
    values = table.get("bids_harmony", table)
    known = {f.name for f in fields(Config)}
    if unknown := sorted(set(values) - known):
        raise UsageError(f"--config-file {path}: unknown setting(s) {', '.join(unknown)}")
    return {key: _typed(path, key, value) for key, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def _typed(path: Path, key: str, value: Any) -> Any:
    """Value in the type of its field.

    Raises
    ------
    UsageError
        If it is of another type.
    """
    kind = _KINDS[key]
    listed = kind.startswith("tuple")
    if listed and isinstance(value, list) and all(isinstance(v, str) for v in value):
        value = tuple(value)
    expected = _TYPES[kind.split(" |")[0]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        words = "a list of texts" if listed else {bool: "true or false", int: "a whole number"}
        told = words if isinstance(words, str) else words.get(expected, "a text")
        raise UsageError(f"--config-file {path}: {key} must be {told}, not {value!r}")
    return Path(str(value)) if key in PATH_FIELDS else value

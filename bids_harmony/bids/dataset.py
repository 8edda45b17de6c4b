"""What stands at the root of the derivative data set; safe to write from many jobs at once."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bids_harmony.bids.find import read_description
from bids_harmony.bids.names import check_label
from bids_harmony.bids.write import atomic_write_text, output_error, write_json, write_tsv
from bids_harmony.errors import DatasetError, OutputError

NAME = "bids_harmony"
BIDS_VERSION = "1.11.1"
LINK = "raw"

# What NiPreps-style outputs have and BIDS has no rule for. `figures` has no slash at its end on
# purpose: with one the validator does not match the folders below sub-*.
IGNORED = (
    "*.html",
    "figures",
    "logs/",
    "*_xfm.*",
    "*_biasfield.*",
    "group_*",
    "models",
)

README = """# bids_harmony derivatives

Brain MRI harmonized by bids_harmony: made to look as if the scanner of the reference domain had
acquired them.

- `sub-*/[ses-*/]anat/`: harmonized scans (`desc-` labels are explained in `descriptions.tsv`),
  brain masks, transforms.
- `sub-*.html`, `sub-*/figures/`: one visual report per participant. Look at it before the scans
  are used.
- `models/`: models learned from these data. `logs/`: settings of every run.

The JSON file beside each scan says which method, model and site were used, and how they were
chosen. The raw scans are linked as `bids:raw:` (see `DatasetLinks` in `dataset_description.json`).
"""


def write_dataset(
    out_dir: Path,
    bids_dir: Path,
    *,
    version: str,
    desc_descriptions: Mapping[str, str],
    container: Mapping[str, str] | None = None,
) -> None:
    """Write dataset_description.json, .bidsignore, README.md and descriptions.tsv.

    The content has no time stamp and does not depend on the order of jobs, so that any number of
    them may write it at the same time. A README and lines of a .bidsignore that are already there
    are kept.

    Parameters
    ----------
    out_dir, bids_dir
        Root of the derivative and of the raw data set.
    version
        Of this package.
    desc_descriptions
        Sentence for each ``desc-`` label in use.
    container
        ``Type``, ``Tag`` and ``URI``; None looks at the environment with `container_info`.

    Raises
    ------
    OutputError
        If something cannot be written.
    """
    if container is None:
        container = container_info(os.environ)
    write_json(
        out_dir / "dataset_description.json",
        dataset_description(out_dir, bids_dir, version=version, container=container),
    )
    with _locked(out_dir):
        _merge_lines(out_dir / ".bidsignore", IGNORED)
        if not (out_dir / "README.md").exists() and not (out_dir / "README").exists():
            atomic_write_text(out_dir / "README.md", README)
    merge_descriptions(out_dir / "descriptions.tsv", desc_descriptions)


def dataset_description(
    out_dir: Path, bids_dir: Path, *, version: str, container: Mapping[str, str]
) -> dict[str, Any]:
    """Content of dataset_description.json of the derivatives."""
    try:
        raw = read_description(bids_dir)
    except DatasetError:
        # Whoever goes on without a valid raw description has asked for it.
        raw = {}
    link = raw_link(out_dir, bids_dir)
    made_by: dict[str, Any] = {
        "Name": NAME,
        "Version": version,
        "Description": "Harmonization of multi-site brain MRI",
    }
    if container:
        made_by["Container"] = dict(container)
    source: dict[str, str] = {"URL": link}
    if isinstance(raw.get("DatasetDOI"), str):
        source = {"DOI": raw["DatasetDOI"]}
    description: dict[str, Any] = {
        "Name": f"{NAME}: harmonized {raw.get('Name') or 'brain MRI'}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [made_by],
        "SourceDatasets": [source],
        "DatasetLinks": {LINK: link},
    }
    # Derivatives may not be shared more freely than the scans they come from.
    if isinstance(raw.get("License"), str):
        description["License"] = raw["License"]
    return description


def raw_link(out_dir: Path, bids_dir: Path) -> str:
    """Where the raw data set is, as a POSIX path relative to the derivatives.

    An absolute path would tell names of users and machines, and break when both folders move
    together.
    """
    relative = os.path.relpath(bids_dir.absolute(), out_dir.absolute())
    return Path(relative).as_posix()


def bids_uri(path: Path, bids_dir: Path, name: str = LINK) -> str:
    """BIDS URI of a file, e.g. ``bids:raw:sub-01/anat/sub-01_T1w.nii.gz``; lexical.

    Parameters
    ----------
    path
        A file below `bids_dir`.
    bids_dir
        Root of the data set that `name` links to; with an empty `name` it is the data set that the
        URI stands in.

    Raises
    ------
    ValueError
        If `path` is not below `bids_dir`.
    """
    return f"bids:{name}:{path.absolute().relative_to(bids_dir.absolute()).as_posix()}"


def container_info(
    environment: Mapping[str, str], marker: Path = Path("/.dockerenv")
) -> dict[str, str]:
    """Container this process runs in, as BIDS ``GeneratedBy.Container``; empty outside of one.

    The image tells its own name in ``BIDS_HARMONY_IMAGE`` (e.g. ``registry/name:1.0``); Apptainer
    tells only the file, of which the name without its folder is kept.
    """
    apptainer = environment.get("APPTAINER_CONTAINER") or environment.get("SINGULARITY_CONTAINER")
    image = environment.get("BIDS_HARMONY_IMAGE", "")
    if apptainer:
        return {"Type": "apptainer", "Tag": image or Path(apptainer).name}
    if marker.exists() or image:
        return {"Type": "docker", **({"Tag": image} if image else {})}
    return {}


def merge_descriptions(path: Path, descriptions: Mapping[str, str]) -> None:
    """Add or replace rows of descriptions.tsv; rows of other runs stay.

    A lock on the folder keeps parallel writers in turn. Where the file system knows no locks, each
    writer looks again after writing and repeats until its rows are there.

    Raises
    ------
    ValueError
        If a label is not a BIDS label.
    OutputError
        If the file cannot be written.
    """
    if not descriptions:
        return
    ours = {check_label("desc", k): " ".join(v.split()) for k, v in descriptions.items()}
    for attempt in range(10):
        with _locked(path.parent):
            rows = _read_descriptions(path) | {f"desc-{k}": v for k, v in ours.items()}
            table = [{"desc_id": k, "description": rows[k]} for k in sorted(rows)]
            write_tsv(path, table, ["desc_id", "description"])
        there = _read_descriptions(path)
        if all(there.get(f"desc-{k}") == v for k, v in ours.items()):
            return
        time.sleep(0.05 * (attempt + 1))
    raise OutputError(f"cannot write {path}: other jobs keep replacing it; run this one again")


def _read_descriptions(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise output_error(path, error) from error
    reader = csv.DictReader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
    return {r["desc_id"]: r.get("description") or "n/a" for r in reader if r.get("desc_id")}


def _merge_lines(path: Path, lines: Sequence[str]) -> None:
    try:
        there = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        there = []
    except OSError as error:
        raise output_error(path, error) from error
    added = [line for line in lines if line not in there]
    if added:
        atomic_write_text(path, "\n".join([*there, *added]) + "\n")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on a folder where the file system has one; leaves no lock file."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise output_error(folder, error) from error
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

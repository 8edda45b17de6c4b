"""The pybids database of ``--bids-database-dir``: read when it exists, built when not."""

from __future__ import annotations

import shutil
import tempfile
from collections import defaultdict
from pathlib import Path

from bids_harmony.bids.entities import IMAGE_EXTENSIONS
from bids_harmony.bids.write import output_error
from bids_harmony.errors import DatasetError, UsageError

DATABASE_FILE = "layout_index.sqlite"


def files_in_database(bids_dir: Path, database: Path) -> dict[str, list[tuple[str | None, Path]]]:
    """Anatomical images of every participant, with their sessions, as the database lists them.

    The database is built with metadata, so that other BIDS Apps may use it too.

    Raises
    ------
    UsageError
        If the database lies in the data set or belongs to another one.
    DatasetError
        If the data set cannot be indexed.
    OutputError
        If the database cannot be written.
    """
    if database.absolute().is_relative_to(bids_dir):
        raise UsageError(
            f"the database {database} would be inside the data set; choose another folder"
        )
    if not (database / DATABASE_FILE).exists():
        _build(bids_dir, database)
    from bids.layout import BIDSLayout

    try:
        layout = BIDSLayout(database_path=str(database), validate=False)
    except Exception as error:
        raise DatasetError(
            f"the pybids database {database} cannot be read ({error}); delete it to rebuild it"
        ) from error
    if Path(layout.root).absolute() != bids_dir:
        raise UsageError(f"the database {database} is of {layout.root}, not of {bids_dir}")
    found: dict[str, list[tuple[str | None, Path]]] = defaultdict(list)
    for item in layout.get(datatype="anat", extension=list(IMAGE_EXTENSIONS)):
        entities = item.get_entities(metadata=False)
        session = entities.get("session")
        found[str(entities["subject"])].append(
            (None if session is None else str(session), Path(item.path))
        )
    return {subject: sorted(files, key=lambda f: f[1]) for subject, files in found.items()}


def _build(bids_dir: Path, database: Path) -> None:
    """Index into a folder beside `database` and rename: parallel jobs never see half of it."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{database.name}.", dir=database.parent))
    except OSError as error:
        raise output_error(database, error) from error
    try:
        BIDSLayout(
            str(bids_dir),
            database_path=str(building),
            validate=False,
            indexer=BIDSLayoutIndexer(validate=False, index_metadata=True),
        )
        database.mkdir(exist_ok=True)
        for path in building.iterdir():
            path.replace(database / path.name)
    except OSError as error:
        raise output_error(database, error) from error
    except Exception as error:
        raise DatasetError(
            f"pybids cannot index {bids_dir} ({error}); leave out --bids-database-dir"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)

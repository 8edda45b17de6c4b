"""What a run works with, made from its `Config`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bids_harmony._version import __version__
from bids_harmony.bids.find import find_scans
from bids_harmony.bids.scan import Scan, ScanProblem
from bids_harmony.bids.write import save_nifti
from bids_harmony.cli.files import derivative_folders, read_filters
from bids_harmony.config import Config
from bids_harmony.errors import UsageError
from bids_harmony.imaging.templates import OutputSpace, find_template, parse_space, template_image
from bids_harmony.methods.base import NATIVE_GRID, Contract
from bids_harmony.resources import detect, parse_memory
from bids_harmony.workflows.engine import Engine, read_plugin_file
from bids_harmony.workflows.models import template_of
from bids_harmony.workflows.settings import Job, Place, Preprocessing

LOG = logging.getLogger("bids_harmony")
_REGISTRATION_MM = 2.0


class Context:
    """Settings of one run worked out, shared by both levels."""

    def __init__(self, config: Config) -> None:
        self.config = config
        now = datetime.now(UTC)
        self.uuid = f"{now:%Y%m%d-%H%M%S}_{uuid.uuid4()}"
        self.folders = derivative_folders(config.derivatives)
        if config.out_dir in self.folders.values():
            raise UsageError(
                f"--derivatives {config.out_dir} is OUT_DIR, whose own masks are reused anyway "
                "when they were made with the same settings; leave it out"
            )
        self.resources = detect(
            config.nprocs, config.omp_nthreads, parse_memory(config.mem) if config.mem else None
        )
        for reason in self.resources.reasons:
            LOG.info("using %s", reason)
        self.engine = self._engine()
        self.spaces = tuple(dict.fromkeys(parse_space(s) for s in config.output_spaces))

    def _engine(self) -> Engine:
        config = self.config
        plugin, plugin_args = (
            read_plugin_file(config.use_plugin) if config.use_plugin else (None, {})
        )
        logs = config.out_dir / "logs"
        return Engine(
            resources=self.resources,
            work_dir=config.work_dir,
            seed=config.random_seed,
            plugin=plugin,
            plugin_args=plugin_args,
            stop_on_first_crash=config.stop_on_first_crash,
            resource_monitor=logs / f"{self.uuid}_resources.json"
            if config.resource_monitor
            else None,
            write_graph=logs / "graph" if config.write_graph else None,
            verbose=config.verbose,
        )

    def find(
        self, modalities: Sequence[str], participants: Sequence[str] | None, *, plain: bool = False
    ) -> tuple[list[Scan], list[ScanProblem]]:
        """Scans of some participants (all if None or empty).

        With `plain`, sessions and filters of this run do not count: what narrows a run narrows
        neither its reference nor what a site is adapted to.
        """
        config = self.config
        if plain:
            config = replace(config, session_label=(), bids_filter_file=None)
        return find_scans(
            config.bids_dir,
            participants=list(participants or ()) or None,
            sessions=list(config.session_label) or None,
            modalities=modalities,
            filters=read_filters(config.bids_filter_file),
            site_from=config.site_from,
            database=None if config.dry_run else config.bids_database_dir,
        )

    def job(self, grid: str) -> Job:
        """What the scans of this run have in common, for a model that works on `grid`."""
        config = self.config
        template = template_of([s.name for s in self.spaces], grid)
        prep = Preprocessing(
            template=template,
            template_file=self.template(template, _REGISTRATION_MM),
            skull_strip=config.skull_strip,
            bias_field="bias-field" not in config.ignore,
            sloppy=config.sloppy,
            threads=self.resources.omp_nthreads,
            seed=config.random_seed,
        )
        kept = config.debug or config.resource_monitor
        return Job(
            prep=prep,
            place=self._place(),
            folders=self.folders,
            engine=self.engine,
            clean=config.clean_workdir and not kept,
        )

    def _place(self) -> Place:
        wanted = [s for s in self.spaces if s.name != "native"]
        return Place(
            bids_dir=self.config.bids_dir,
            out_dir=self.config.out_dir,
            work_dir=self.config.work_dir,
            desc=self.config.desc,
            spaces=self.spaces,
            space_files={(s.name, s.res): self._space_file(s) for s in wanted},
        )

    def _space_file(self, space: OutputSpace) -> Path:
        return self.template(space.name, space.resolution)

    def grid_file(self, contract: Contract) -> Path | None:
        """Template image on a contract's grid; None on the native grid."""
        if contract.grid == NATIVE_GRID:
            return None
        return self.template(contract.grid, contract.resolution)

    def template(self, name: str, resolution: float | None) -> Path:
        """Template image in the work folder, made once (not at all in a dry run)."""
        label = f"{resolution:g}mm" if resolution else "own"
        path = self.config.work_dir / "templates" / f"tpl-{name}_{label}_{__version__}.nii"
        find_template(name)
        if not path.is_file() and not self.config.dry_run:
            image = template_image(name, resolution)
            save_nifti(image.get_fdata(dtype="float32"), image.affine, path)
        return path

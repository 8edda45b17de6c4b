"""What all interfaces here share: every run tells how long it took."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

from nipype.interfaces.base import (
    BaseInterfaceInputSpec,
    File,
    SimpleInterface,
    TraitedSpec,
    isdefined,
    traits,
)

__all__ = [
    "BaseInterfaceInputSpec",
    "File",
    "TimedInterface",
    "TimedOutputSpec",
    "TraitedSpec",
    "isdefined",
    "traits",
]


class TimedOutputSpec(TraitedSpec):
    """Outputs of every interface."""

    seconds = traits.Float(desc="duration")


class TimedInterface(SimpleInterface):
    """A SimpleInterface whose `_run` fills `self._results`, timed."""

    output_spec = TimedOutputSpec

    def _run(self, cwd: Path) -> None:
        raise TypeError(f"{type(self).__name__} lacks _run")

    def _run_interface(self, runtime: Any) -> Any:
        start = perf_counter()
        self._run(Path(runtime.cwd))
        self._results["seconds"] = round(perf_counter() - start, 3)
        return runtime

    def _given(self, name: str) -> Any:
        """Value of an input, None when it was not set."""
        value = getattr(self.inputs, name)
        return value if isdefined(value) else None

"""Numbers that one method alone has, as its card names them and as the user sets them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from bids_harmony.errors import UsageError

LEVELS = ("train", "participant")
_MOST_STEPS = 1e6


@dataclass(frozen=True)
class MethodOption:
    """One number of a method.

    Attributes
    ----------
    name
        For ``--method-option NAME=VALUE``.
    level
        ``train``: it decides what is learned; ``participant``: how a scan is harmonized.
    default, minimum, maximum
        Values; the range includes its ends.
    summary
        What it is, in words.
    step
        Values lie so far apart, from the minimum on; 0 for any number. A card may leave it out.
    """

    name: str
    level: str
    default: float
    minimum: float
    maximum: float
    summary: str
    step: float = 0.0

    def allows(self, value: float) -> bool:
        """Whether it may have this value."""
        if not self.minimum <= value <= self.maximum:
            return False
        return math.isclose(value, self.nearest(value), abs_tol=1e-6 * self.step)

    def nearest(self, value: float) -> float:
        """The value on a step that is nearest."""
        if not self.step:
            return value
        return self.minimum + round((value - self.minimum) / self.step) * self.step

    @property
    def range(self) -> str:
        """Allowed values in words."""
        steps = f" in steps of {self.step:g}" if self.step else ""
        return f"{self.minimum:g} to {self.maximum:g}{steps}"


def read_options(tables: Sequence[Mapping[str, Any]], source: str) -> tuple[MethodOption, ...]:
    """Options of a card, from its ``[[options]]`` tables.

    Raises
    ------
    UsageError
        If a field is missing, unknown or of the wrong type, a level is unknown, a number is
        not finite, a step does not fit, a default is not allowed, or two options have one name.
    """
    found = []
    for table in tables:
        known = {item.name: str(item.type) for item in fields(MethodOption)}
        values: dict[str, Any] = {}
        lacks = {
            item.name for item in fields(MethodOption) if item.default is MISSING
        } - table.keys()
        odd = ", ".join(sorted(lacks | (table.keys() - known.keys())))
        if odd:
            raise UsageError(
                f"{source}: an option of the method card lacks or has too much: {odd}"
            )
        for key, value in table.items():
            number = isinstance(value, float | int) and not isinstance(value, bool)
            if number != (known[key] == "float") or not isinstance(value, float | int | str):
                raise UsageError(f"{source}: options: {key} must be {known[key]}, not {value!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"{source}: options: {key} must be finite")
            values[key] = float(value) if number else value
        option = MethodOption(**values)
        steps = (option.maximum - option.minimum) / option.step if option.step else 1
        sound = option.level in LEVELS and 1 <= steps <= _MOST_STEPS
        if not (sound and option.allows(option.default)):
            raise UsageError(
                f"{source}: option {option.name}: level must be {' or '.join(LEVELS)}, the step 0 "
                "or a part of the range, and the default in the range and on a step"
            )
        found.append(option)
    if len({option.name for option in found}) < len(found):
        raise UsageError(f"{source}: two options of the method card have one name")
    return tuple(found)


def options_for(
    method: str, options: Iterable[MethodOption], level: str, given: Sequence[str]
) -> dict[str, float]:
    """Values of all options that a method has at a level: those that were given, else defaults.

    Parameters
    ----------
    method
        For messages.
    options
        All of the method.
    given
        Words ``NAME=VALUE`` as the user wrote them.

    Raises
    ------
    UsageError
        If one is unknown, of the other level, given twice, no number or out of its range.
    """
    known = {option.name: option for option in options}
    values = {name: option.default for name, option in known.items() if option.level == level}
    seen: set[str] = set()
    for word in given:
        name, equals, text = word.partition("=")
        if name not in known:
            all_names = ", ".join(known) or "no options of its own"
            raise UsageError(f"--method-option {word}: {method} has {all_names}")
        option = known[name]
        if option.level != level:
            raise UsageError(f"--method-option {word}: {name} is for {option.level}")
        value = _number(text) if equals else math.nan
        if name in seen or not option.allows(value):
            raise UsageError(
                f"--method-option {word}: give {name} once, as a number from {option.range}"
            )
        values[name] = option.nearest(value)
        seen.add(name)
    return values


def defaults(options: Iterable[MethodOption], level: str) -> dict[str, float]:
    """Values of a level's options when nothing is given."""
    return {option.name: option.default for option in options if option.level == level}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

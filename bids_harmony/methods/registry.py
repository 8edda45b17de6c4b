"""Find harmonization methods and their cards without importing them.

Built-in methods are the cards in ``data/methods``. Others come from installed packages: an entry
point in the group ``bids_harmony.methods`` (``name = package.module:Class``) and a card
``<name>.toml`` in the folder of that module.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from importlib import metadata, resources, util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bids_harmony.errors import UsageError
from bids_harmony.methods.options import LEVELS, MethodOption, read_options

if TYPE_CHECKING:
    from bids_harmony.methods.base import Method

ENTRY_POINT_GROUP = "bids_harmony.methods"
KINDS = ("statistical", "neural")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "tuple[str, ...]": (list,),
}


@dataclass(frozen=True)
class MethodCard:
    """What is known about a method before its code is loaded.

    Attributes
    ----------
    name, title, summary
        Name on the command line, name in print, one sentence.
    target
        ``package.module:Class``.
    kind
        ``statistical`` or ``neural``.
    modalities
        Modalities it can be trained on.
    sites_to_train
        Least number of sites needed to train.
    paired, labels
        Whether training needs travelling subjects, or tissue labels.
    grid
        ``native`` or a template name.
    memory_gb
        Memory for one scan at 1 mm, in GB.
    devices
        ``cpu``, ``cuda``.
    monotone
        Whether it keeps the rank order of the brain's intensities.
    status
        ``stable`` or ``experimental``.
    citation, doi
        The paper.
    adapts
        Whether it can learn something from the scans of a site that training has not seen.
    presets
        Sizes of network and training to choose from, the default first; for neural methods.
    by_example
        Whether it is trained on several sites and takes the wanted appearance from examples.
    needs
        Python modules that are not installed with bids_harmony itself.
    install
        What to install when one of them is missing.
    options
        Numbers of its own that the user can set (``[[options]]`` tables).
    """

    name: str
    title: str
    summary: str
    target: str
    kind: str
    modalities: tuple[str, ...]
    sites_to_train: int
    paired: bool
    labels: bool
    grid: str
    memory_gb: float
    devices: tuple[str, ...]
    monotone: bool
    status: str
    citation: str
    doi: str = ""
    adapts: bool = False
    presets: tuple[str, ...] = ()
    by_example: bool = False
    needs: tuple[str, ...] = ()
    install: str = ""
    options: tuple[MethodOption, ...] = ()


def read_card(text: str, source: str, *, target: str | None = None) -> MethodCard:
    """Parse a card.

    Parameters
    ----------
    text
        TOML with the fields of `MethodCard`.
    source
        Where it comes from, for messages.
    target
        Class given by the entry point; None when the card itself must name it.

    Raises
    ------
    UsageError
        If it is not TOML, or a field is missing, unknown or of the wrong type.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{source}: not valid TOML ({error})") from error
    if target is not None:
        content["target"] = target
    known = {item.name: str(item.type) for item in fields(MethodCard)}
    needed = {item.name for item in fields(MethodCard) if item.default is MISSING}
    for problem, names in (
        ("lacks", needed - content.keys()),
        ("has unknown fields", content.keys() - known.keys()),
    ):
        if names:
            raise UsageError(f"{source}: the method card {problem} {', '.join(sorted(names))}")
    tables = content.pop("options", [])
    values = {key: _typed(value, known[key], f"{source}: {key}") for key, value in content.items()}
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{source}: options must be tables, each under [[options]]")
    values["options"] = read_options(tables, source)
    if values["kind"] not in KINDS:
        raise UsageError(f"{source}: kind must be {' or '.join(KINDS)}, not {values['kind']!r}")
    card = MethodCard(**values)
    if (card.kind == "neural") != bool(card.presets):
        raise UsageError(f"{source}: presets are for neural methods, which have at least one")
    if (card.adapts or card.options) and card.kind != "neural":
        raise UsageError(f"{source}: only neural methods adapt to sites or have options")
    return card


def _typed(value: Any, wanted: str, where: str) -> Any:
    accepted = _TYPES[wanted]
    wrong = not isinstance(value, accepted) or (wanted != "bool" and isinstance(value, bool))
    if wrong or (accepted == (list,) and not all(isinstance(item, str) for item in value)):
        raise UsageError(f"{where} must be {wanted}, not {value!r}")
    return tuple(value) if accepted == (list,) else value


def available() -> dict[str, MethodCard]:
    """Every method that can be used, by name in alphabetical order; no method is imported.

    Raises
    ------
    UsageError
        If a card is broken or two packages offer the same name.
    """
    cards: dict[str, MethodCard] = {}
    owners: dict[str, str] = {}
    for card, owner in (*_built_in(), *_plugged_in()):
        if card.name in cards:
            if cards[card.name].target == card.target:
                continue
            raise UsageError(
                f"two methods are named {card.name!r}: {cards[card.name].target} of "
                f"{owners[card.name]} and {card.target} of {owner}; uninstall one of them"
            )
        cards[card.name], owners[card.name] = card, owner
    return dict(sorted(cards.items()))


def _built_in() -> Iterator[tuple[MethodCard, str]]:
    folder = resources.files("bids_harmony.data") / "methods"
    for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if item.name.endswith(".toml"):
            yield read_card(item.read_text(encoding="utf-8"), item.name), "bids_harmony"


def _plugged_in() -> Iterator[tuple[MethodCard, str]]:
    for entry in sorted(metadata.entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        if entry.module.partition(".")[0] == "bids_harmony":
            continue
        owner = entry.dist.name if entry.dist else entry.module
        path = _module_folder(entry.module, owner) / f"{entry.name}.toml"
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{path}: the method card of {entry.name!r} cannot be read; repair or uninstall "
                f"the package {owner}"
            ) from error
        card = read_card(text, str(path), target=entry.value)
        if card.name != entry.name:
            raise UsageError(f"{path}: the card is named {card.name!r}, not {entry.name!r}")
        yield card, owner


def _module_folder(module: str, owner: str) -> Path:
    """Folder of a module, found without importing it or its package."""
    top, *rest = module.split(".")
    spec = util.find_spec(top)
    if spec is not None and spec.submodule_search_locations and rest:
        for location in spec.submodule_search_locations:
            folder = Path(location).joinpath(*rest[:-1])
            if (folder / f"{rest[-1]}.py").exists() or (folder / rest[-1]).is_dir():
                return folder
    if spec is not None and spec.origin and not rest:
        return Path(spec.origin).parent
    raise UsageError(f"the package {owner} offers a method in {module}, which does not exist")


def _card(name: str) -> MethodCard:
    cards = available()
    if name not in cards:
        raise UsageError(f"no method is named {name!r}; choose from {', '.join(cards)}")
    return cards[name]


def load(name: str) -> type[Method]:
    """Import the class of a method.

    Raises
    ------
    UsageError
        If no method has this name, something it needs is not installed, its class cannot be
        imported, is not a `Method` or not what the card says.
    """
    card = _card(name)
    _require(card)
    module_name, _, attribute = card.target.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"the method {name!r} cannot be loaded: {error}") from error
    from bids_harmony.methods.base import Method, NeuralMethod  # numpy only when wanted

    if not (isinstance(found, type) and issubclass(found, Method)) or found.name != name:
        raise UsageError(f"{card.target} is not a harmonization method named {name!r}")
    is_so: tuple[Any, ...] = (False, False, False, (), {})
    if issubclass(found, NeuralMethod):
        own = {
            (name, level): default
            for level, options in zip(
                LEVELS, (found.train_options, found.participant_options), strict=True
            )
            for name, default in options.items()
        }
        is_so = (True, found.adapts, found.by_example, found.presets, own)
    said = {(option.name, option.level): option.default for option in card.options}
    if is_so != (card.kind == "neural", card.adapts, card.by_example, card.presets, said):
        raise UsageError(
            f"{card.target} and its card differ in kind, adapts, by_example, presets or options; "
            "repair the card"
        )
    return found


def _require(card: MethodCard) -> None:
    """See that what a method needs besides bids_harmony itself is installed; imports nothing."""
    missing = [module for module in card.needs if util.find_spec(module) is None]
    if missing:
        cure = card.install or " ".join(missing)
        raise UsageError(
            f"the method {card.name!r} needs {', '.join(missing)}, not installed here: "
            f"pip install '{cure}'"
        )


def methods_table() -> str:
    """Markdown table of `available`, for the documentation."""
    names = "method, kind, modalities, sites to train, paired, labels, grid, monotone, adapts"
    head = f"| {' | '.join([*names.split(', '), 'by example'])} |"
    rows = [head, "|" + "---|" * (head.count("|") - 1)]
    rows += [
        f"| `{card.name}` | {card.kind} | {', '.join(card.modalities)} | {card.sites_to_train} "
        f"| {_yes(card.paired)} | {_yes(card.labels)} | {card.grid} | {_yes(card.monotone)} "
        f"| {_yes(card.adapts)} | {_yes(card.by_example)} |"
        for card in available().values()
    ]
    return "\n".join(rows) + "\n"


def options_table() -> str:
    """Markdown table of the methods' own options, for the documentation."""
    head = "| method | option | for | default | range | what it is |"
    rows = [head, "|" + "---|" * (head.count("|") - 1)]
    rows += [
        f"| `{card.name}` | `{o.name}` | {o.level} | {o.default:g} | {o.range} | {o.summary} |"
        for card in available().values()
        for o in card.options
    ]
    return "\n".join(rows) + "\n"


def _yes(value: bool) -> str:
    return "yes" if value else "no"

"""Boutiques descriptor of the command, read off its parser, the method cards and the errors."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from typing import Any

from bids_harmony._version import __version__
from bids_harmony.bids.scan import MODALITIES
from bids_harmony.cli.parser import LEVELS
from bids_harmony.errors import ExitCode, HarmonyError
from bids_harmony.methods.registry import available

SCHEMA_VERSION = "0.5"
BIDS_APP_VERSION = "2.0"
#: Identifiers that the BIDS Apps execution specification prescribes.
RESERVED = {
    "bids_dir": "InputDataset",
    "out_dir": "OutputLocation",
    "analysis_level": "AnalysisLevel",
    "help": "Help",
    "version": "ToolVersion",
}
#: Exit codes that no class of error stands for.
OTHER_CODES = {
    ExitCode.FAILURE: "A scan failed because of the software or the machine; see logs/.",
    ExitCode.UNKNOWN_LEVEL: "The analysis level is unknown.",
    ExitCode.IO: "A file could not be read or written.",
    ExitCode.TEMPORARY: "A temporary failure; the same command may succeed later.",
}
_BASE_GB = 2.0  # ample for one process on a 1 mm head; the method comes on top


def descriptor(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Boutiques 0.5 descriptor of a parser.

    Parameters
    ----------
    parser
        The parser of the command; positional arguments, options and choices come from it.

    Returns
    -------
    descriptor
        JSON-serialisable; ``bosh validate`` accepts it.
    """
    inputs = [entry for action in parser._actions for entry in _inputs(action)]
    keys = " ".join(entry["value-key"] for entry in inputs)
    return {
        "name": parser.prog,
        "description": str(parser.description),
        "tool-version": __version__,
        "schema-version": SCHEMA_VERSION,
        "command-line": f"{parser.prog} {keys}",
        "container-image": {
            "type": "docker",
            "image": os.environ.get("BIDS_HARMONY_IMAGE", f"{parser.prog}:{__version__}"),
            "entrypoint": True,
        },
        "inputs": inputs,
        "groups": _groups({entry["id"] for entry in inputs}),
        "output-files": _outputs(),
        "error-codes": error_codes(),
        "suggested-resources": {
            "cpu-cores": 1,
            "ram": _BASE_GB + max(card.memory_gb for card in available().values()),
        },
        "tags": {"domain": ["neuroinformatics", "mri"], "modality": list(MODALITIES)},
        "custom": {"BIDSApplicationVersion": BIDS_APP_VERSION},
    }


def descriptor_json(parser: argparse.ArgumentParser) -> str:
    """`descriptor` as JSON text."""
    return json.dumps(descriptor(parser), indent=2)


def error_codes() -> list[dict[str, Any]]:
    """Code and meaning of every `ExitCode` but success, in ascending order."""
    meaning = {kind.exit_code: _sentence(kind) for kind in _kinds(HarmonyError)} | OTHER_CODES
    return [
        {"code": int(code), "description": meaning[code]}
        for code in ExitCode
        if code != ExitCode.OK
    ]


def _kinds(base: type[HarmonyError]) -> Iterator[type[HarmonyError]]:
    for kind in base.__subclasses__():
        if kind.__module__ == HarmonyError.__module__:
            yield kind
            yield from _kinds(kind)


def _sentence(kind: type[HarmonyError]) -> str:
    return str(kind.__doc__).strip().splitlines()[0]


def _inputs(action: argparse.Action) -> Iterator[dict[str, Any]]:
    """Inputs of one argument; an option with a ``--no-`` form becomes two flags."""
    camel = "".join(word.capitalize() for word in _name(action).split("_"))
    name = RESERVED.get(_name(action), camel)
    if isinstance(action, argparse.BooleanOptionalAction):
        yes, no = (s for s in action.option_strings if "_" not in s)
        yield _flag(action, name, yes)
        yield _flag(action, f"No{name}", no)
    elif action.nargs == 0:
        yield _flag(action, name, _long(action))
    else:
        yield _valued(action, name)


def _name(action: argparse.Action) -> str:
    """Destination, or for options that store nothing the long option."""
    return _long(action)[2:].replace("-", "_") if action.option_strings else action.dest


def _long(action: argparse.Action) -> str:
    return next(s for s in action.option_strings if s.startswith("--"))


def _entry(action: argparse.Action, name: str, kind: str, optional: bool) -> dict[str, Any]:
    return {
        "id": name,
        "name": _words(name),
        "type": kind,
        "description": _description(action),
        "optional": optional,
        "value-key": f"[{name}]",
    }


def _flag(action: argparse.Action, name: str, option: str) -> dict[str, Any]:
    return _entry(action, name, "Flag", True) | {"command-line-flag": option}


def _valued(action: argparse.Action, name: str) -> dict[str, Any]:
    integer = _converts(action, "1") == 1
    kind = "Number" if integer else "File" if _is_file(action) else "String"
    entry = _entry(action, name, kind, bool(action.option_strings))
    if action.option_strings:
        entry["command-line-flag"] = _long(action)
    if integer:
        entry["integer"] = True
        if _converts(action, "0") is None:
            entry["minimum"] = 1
    if action.nargs == "+":
        entry |= {"list": True, "min-list-entries": 1}
    choices = LEVELS if action.dest == "analysis_level" else action.choices
    if choices:
        entry["value-choices"] = list(choices)
    return entry


def _is_file(action: argparse.Action) -> bool:
    """Whether the value must exist; folders that a run may make are plain text."""
    return action.dest == "bids_dir" or action.metavar == "FILE"


def _converts(action: argparse.Action, text: str) -> Any:
    """What the parser makes of a value; None when it refuses it."""
    if not callable(action.type):
        return text
    try:
        return action.type(text)
    except (argparse.ArgumentTypeError, ValueError):
        return None


def _words(name: str) -> str:
    """``InputDataset`` -> ``Input dataset``."""
    text = "".join(f" {letter.lower()}" if letter.isupper() else letter for letter in name)
    return text.strip().capitalize()


def _description(action: argparse.Action) -> str:
    text = argparse.HelpFormatter("")._expand_help(action)
    if action.dest != "method":
        return text
    cards = (f"{card.name}: {card.summary}" for card in available().values())
    return f"{text}. " + " ".join(cards)


def _groups(names: set[str]) -> list[dict[str, Any]]:
    """Inputs of which at most one may be given."""
    pairs = [(n[2:], n) for n in sorted(names) if n.startswith("No") and n[2:] in names]
    return [
        {
            "id": f"{first}Or{second}",
            "name": f"{_words(first)} or {_words(second).lower()}",
            "members": [first, second],
            "mutually-exclusive": True,
        }
        for first, second in pairs
    ]


def _outputs() -> list[dict[str, Any]]:
    out = "[OutputLocation]"
    found = (
        ("DatasetDescription", "dataset_description.json", "derivative data set", False),
        ("Reports", "sub-*.html", "participant: one report per participant", True),
        ("Models", "models/*/model.json", "train: model bundles", True),
        ("Logs", "logs/*.toml", "settings of every run", False),
    )
    return [
        {
            "id": name,
            "name": _words(name),
            "description": text,
            "path-template": f"{out}/{path}",
            "optional": optional,
            "list": "*" in path,
        }
        for name, path, text, optional in found
    ]

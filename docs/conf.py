"""Sphinx settings; what the code already says is filled into the pages when they are built."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from bids_harmony._version import __version__
from bids_harmony.cli import phantom
from bids_harmony.cli.boutiques import error_codes
from bids_harmony.cli.parser import build_parser
from bids_harmony.methods.registry import available, methods_table, options_table

project = "bids_harmony"
author = "The bids_harmony developers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
smartquotes = False
html_theme = "alabaster"
html_theme_options = {
    "description": "Harmonization of multi-site brain MRI",
    "page_width": "1100px",
}


def options(parser: argparse.ArgumentParser) -> str:
    """Markdown reference of a parser: one table per group of arguments."""
    return "\n\n".join(_tables(parser))


def _tables(parser: argparse.ArgumentParser) -> Iterator[str]:
    formatter = argparse.HelpFormatter(parser.prog)
    for group in parser._action_groups:
        if not group._group_actions:
            continue
        rows = [f"## {str(group.title).capitalize()}", "", "| argument | meaning |", "|---|---|"]
        for action in group._group_actions:
            names = [s for s in action.option_strings if "_" not in s] or [action.dest.upper()]
            value = (
                formatter._format_args(action, action.dest.upper()) if action.nargs != 0 else ""
            )
            shown = ", ".join(f"`{name}`" for name in names)
            if value not in ("", *names):
                shown += f" `{value}`"
            rows.append(f"| {_cell(shown)} | {_cell(formatter._expand_help(action), '*<')} |")
        yield "\n".join(rows)


def _cell(text: str, special: str = "") -> str:
    """Text that may stand in a Markdown table."""
    return "".join(f"\\{letter}" if letter in f"|{special}" else letter for letter in text)


def exit_codes() -> str:
    """Markdown table of the exit codes."""
    rows = ["| code | meaning |", "|---|---|", "| 0 | Every scan asked for is done. |"]
    rows += [f"| {entry['code']} | {_cell(entry['description'])} |" for entry in error_codes()]
    return "\n".join(rows)


def method_cards() -> str:
    """Table of the methods and one line on each."""
    lines = [f"- `{card.name}`: {card.summary}" for card in available().values()]
    return methods_table() + "\n" + "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "options": lambda: options(build_parser()),
    "phantom options": lambda: options(phantom.build_parser()),
    "exit codes": exit_codes,
    "methods": method_cards,
    "method options": options_table,
}


def fill(text: str) -> str:
    """Replace every ``<!-- generated: NAME -->`` by what NAME stands for."""
    return re.sub(r"<!-- generated: ([a-z ]+) -->", lambda match: GENERATED[match[1]](), text)


def _fill_page(app: Any, docname: str, source: list[str]) -> None:
    source[0] = fill(source[0])


def setup(app: Any) -> None:
    """Register the filling of pages."""
    app.connect("source-read", _fill_page)

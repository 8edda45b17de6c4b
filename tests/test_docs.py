"""What the pages say is what the code does: options, commands, links, examples."""

import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bids_harmony.cli import phantom
from bids_harmony.cli.parser import build_parser, parse_args
from bids_harmony.errors import ExitCode
from bids_harmony.methods.registry import available

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*sorted(DOCS.glob("*.md")), *[p for p in [ROOT / "README.md"] if p.exists()]]
SETTINGS = runpy.run_path(str(DOCS / "conf.py"))


def text_of(path):
    """Page with its generated parts."""
    return SETTINGS["fill"](path.read_text())


def blocks(path, language):
    pattern = rf"^```{language}\n(.*?)^```$"
    return re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("parser", [build_parser(), phantom.build_parser()], ids=lambda p: p.prog)
def test_every_argument_is_in_the_reference(parser):
    reference = text_of(DOCS / "cli.md")
    for action in parser._actions:
        for option in action.option_strings or [action.dest.upper()]:
            assert f"`{option.replace('_', '-') if '--' in option else option}`" in reference
        if action.option_strings and action.help:
            first = re.split(r"[|*<%:;(]", action.help)[0].strip()
            assert first in reference.replace("\\", "")


def test_methods_and_exit_codes_are_on_the_pages():
    developers, usage = text_of(DOCS / "developers.md"), text_of(DOCS / "usage.md")
    methods = (DOCS / "methods.md").read_text()
    for name, card in available().items():
        assert f"| `{name}` |" in developers
        assert card.summary in developers
        assert f"(`{name}`)" in methods
    for code in ExitCode:
        assert re.search(rf"^\| {int(code)} \| \S", usage, re.MULTILINE)


def test_every_page_is_in_the_table_of_contents():
    listed = {
        line
        for block in blocks(DOCS / "index.md", r"\{toctree\}")
        for line in block.split("\n")
        if re.fullmatch(r"\w+", line)
    }
    assert listed == {page.stem for page in DOCS.glob("*.md")} - {"index"}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```$", "", text_of(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        other = page.parent / name if name else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", text_of(other), re.MULTILINE)
            assert anchor in {slug(h) for h in headings}, f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_no_path_of_a_machine(page):
    found = re.findall(r"(?<![\w.}\"])/(?:work|home|root|Users|mnt|tmp/h)/\w\S*", page.read_text())
    assert not found


def commands(page):
    """Lines of the page's shell blocks, continued lines joined."""
    for block in blocks(page, "bash"):
        yield from block.replace("\\\n", " ").splitlines()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shell_blocks_are_valid_and_their_commands_are_understood(page, tmp_path):
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
    (tmp_path / "anything").touch()
    for line in commands(page):
        words = shlex.split(line, comments=True)
        for word, start in ((w, i + 1) for i, w in enumerate(words)):
            name = Path(word).name
            if name == "bids_harmony-phantom":
                phantom.build_parser().parse_args(words[start:])
            elif name in ("bids_harmony", "bids_harmony:0.1.0", "bids_harmony.sif"):
                arguments = words[start:]
                if arguments[:1] in (["--version"], ["--help"]) or len(arguments) < 3:
                    continue
                assert parse_args(arguments).analysis_level in ("train", "participant")


def test_there_are_commands_to_check():
    lines = [line for page in PAGES for line in commands(page)]
    assert sum("participant" in line for line in lines) > 12


@pytest.fixture(scope="module")
def plugin(tmp_path_factory):
    """The package of the worked example, installed in a folder of its own."""
    code, trial = blocks(DOCS / "developers.md", "python")
    card, project = blocks(DOCS / "developers.md", "toml")
    root = tmp_path_factory.mktemp("site")
    package, info = root / "mean_match", root / "mean_match-1.0.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").touch()
    (package / "method.py").write_text(code)
    (package / "mean-match.toml").write_text(card)
    entry = re.search(r'^(mean-match) = "(.*)"$', project, re.MULTILINE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mean_match\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[bids_harmony.methods]\n{entry[1]} = {entry[2]}\n")
    return root, trial


def run(code, root):
    """Run Python in a process that sees the plug-in."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = [{str(root)!r}]\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


def test_the_worked_example_runs(plugin):
    root, trial = plugin
    done = run(trial, root)
    assert done.returncode == 0, done.stderr
    broken = run(trial.replace("1 / 0.6", "1 / 0.7"), root)
    assert "AssertionError" in broken.stderr


def test_the_worked_example_is_offered_on_the_command_line(plugin):
    root, _ = plugin
    code = """
    from bids_harmony.cli.parser import build_parser
    assert "mean-match" in build_parser().format_help()
    """
    done = run(textwrap.dedent(code), root)
    assert done.returncode == 0, done.stderr

"""Imports only go down, and heavy libraries stay where they belong."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "bids_harmony"
FLOORS = (
    {"data"},
    {"config", "resources", "errors", "_version"},
    {"bids"},
    {"imaging"},
    {"phantom"},
    {"networks"},
    {"training"},
    {"methods"},
    {"metrics"},
    {"reports"},
    {"interfaces"},
    {"workflows"},
    {"cli"},
)
FLOOR_OF = {name: level for level, names in enumerate(FLOORS) for name in names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.parent != ROOT or p.stem in FLOOR_OF)


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module))
    return found


def house_of(path: Path) -> str:
    part = path.relative_to(ROOT).parts[0]
    return part.removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    here = FLOOR_OF[house_of(path)]
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] == "bids_harmony" and len(parts) > 1:
            assert FLOOR_OF[parts[1]] <= here, f"{path.name} imports {name} from a higher floor"


@pytest.mark.parametrize(
    ("library", "allowed"),
    [
        ("nipype", ("workflows", "interfaces")),
        ("ants", ("interfaces",)),
        ("torch", ("methods", "training", "networks", "resources")),
        ("lightning", ("training",)),
        ("bids", ("bids",)),
        ("jinja2", ("reports",)),
    ],
)
def test_libraries_stay_in_their_house(library, allowed):
    users = {house_of(p) for p in FILES if any(n.split(".")[0] == library for n in imports_of(p))}
    assert users <= set(allowed)


def test_methods_know_no_bids():
    for path in (ROOT / "methods").glob("*.py"):
        assert not any(n.startswith("bids_harmony.bids") for n in imports_of(path)), path


def run_python(code, *arguments):
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_help_and_version_load_nothing_heavy(option):
    code = (
        "import sys\n"
        "from bids_harmony.cli.main import main\n"
        "try:\n    main([sys.argv[1]])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'numpy','scipy','nibabel','nipype','ants','torch','matplotlib','pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    start = time.perf_counter()
    run_python(code, option)
    # generous, since tests share the machine; benchmarks/startup.py measures
    assert time.perf_counter() - start < 10


def test_loading_the_methods_imports_no_heavy_library_but_torch():
    code = (
        "import sys\n"
        "from bids_harmony.methods import registry\n"
        "for name in registry.available():\n    registry.load(name)\n"
        "assert 'torch' in sys.modules\n"
        "heavy = {'lightning','monai','matplotlib','nipype','ants'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    run_python(code)

"""The Boutiques descriptor says what the parser, the method cards and the errors say."""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from bids_harmony._version import __version__
from bids_harmony.cli.boutiques import descriptor, error_codes
from bids_harmony.cli.parser import LEVELS, build_parser, parse_args
from bids_harmony.errors import ExitCode
from bids_harmony.methods.registry import available

PARSER = build_parser()
DESCRIPTOR = descriptor(PARSER)
INPUTS = {entry["id"]: entry for entry in DESCRIPTOR["inputs"]}


def test_printed_without_positional_arguments_and_without_heavy_libraries():
    code = (
        "import sys\n"
        "from bids_harmony.cli.main import main\n"
        "try:\n    main(['--bids-exec-spec'])\n"
        "except SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'numpy','scipy','nibabel','nipype','ants','torch','matplotlib','pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["inputs"] == DESCRIPTOR["inputs"]


def test_boutiques_accepts_it(tmp_path):
    validator = pytest.importorskip("boutiques.validator", reason="boutiques is not installed")
    validator.validate_descriptor(json.loads(json.dumps(DESCRIPTOR)))
    broken = {key: value for key, value in DESCRIPTOR.items() if key != "inputs"}
    with pytest.raises(validator.DescriptorValidationError):
        validator.validate_descriptor(broken)


def test_required_keys():
    assert DESCRIPTOR["schema-version"] == "0.5"
    assert DESCRIPTOR["tool-version"] == __version__
    assert DESCRIPTOR["custom"]["BIDSApplicationVersion"] == "2.0"
    assert {"InputDataset", "OutputLocation", "AnalysisLevel", "Help", "ToolVersion"} <= set(
        INPUTS
    )
    assert {"ParticipantLabel", "SessionLabel"} <= set(INPUTS)
    required = [name for name, entry in INPUTS.items() if not entry["optional"]]
    assert required == ["InputDataset", "OutputLocation", "AnalysisLevel"]


def test_every_argument_is_an_input_and_every_flag_is_known():
    flags = {entry.get("command-line-flag") for entry in INPUTS.values()} - {None}
    known = {s for action in PARSER._actions for s in action.option_strings}
    assert flags <= known
    for action in PARSER._actions:
        assert not action.option_strings or flags & set(action.option_strings), action
    positional = [a for a in PARSER._actions if not a.option_strings]
    assert len(positional) == len([e for e in INPUTS.values() if "command-line-flag" not in e])


def test_choices_come_from_parser_and_cards():
    assert INPUTS["Method"]["value-choices"] == sorted(available())
    for card in available().values():
        assert card.summary in INPUTS["Method"]["description"]
    assert tuple(INPUTS["AnalysisLevel"]["value-choices"]) == LEVELS
    least = max(card.memory_gb for card in available().values())
    assert DESCRIPTOR["suggested-resources"]["ram"] > least


def test_numbers_lists_and_files():
    assert INPUTS["Nprocs"]["type"] == "Number"
    assert INPUTS["Nprocs"]["minimum"] == 1
    assert "minimum" not in INPUTS["RandomSeed"]
    assert INPUTS["ParticipantLabel"]["list"]
    assert INPUTS["BidsFilterFile"]["type"] == "File"
    assert INPUTS["WorkDir"]["type"] == "String"
    assert INPUTS["Mem"]["type"] == "String"
    assert INPUTS["DryRun"]["type"] == "Flag"


def command(invocation):
    """The command line that Boutiques would run, after its rules of substitution."""
    line = DESCRIPTOR["command-line"]
    for name, entry in INPUTS.items():
        value = invocation.get(name)
        words = [] if value in (None, False) else [entry.get("command-line-flag", "")]
        if words and value is not True:
            words += [shlex.quote(str(v)) for v in (value if isinstance(value, list) else [value])]
        line = line.replace(entry["value-key"], " ".join(words))
    assert not re.search(r"\[\w+\]", line)
    return shlex.split(line)[1:]


def value_of(entry, default):
    """A value that the input takes and that is not its default."""
    if entry["type"] == "Flag":
        return True
    choices = entry.get("value-choices", [3 if entry["type"] == "Number" else "word"])
    value = next(c for c in choices if c != default)
    return [value] if entry.get("list") else value


STOPS = {"Help", "ToolVersion", "BidsExecSpec", "ConfigFile"}
TRAIN = {"Name", "Preset", "MaxTime", "AdaptTo"}
BASE = {"InputDataset": "raw", "OutputLocation": "out", "AnalysisLevel": "participant"}


@pytest.mark.parametrize("name", [n for n in INPUTS if n not in {*STOPS, *BASE, *TRAIN}])
def test_the_parser_understands_what_boutiques_would_run(name):
    """With an input set, exactly that setting differs from a run without it."""
    plain = parse_args(command(BASE))
    defaults = {"".join(w.capitalize() for w in k.split("_")): v for k, v in vars(plain).items()}
    setting = re.sub("^No(?=[A-Z])", "", name)
    value = value_of(INPUTS[name], defaults[setting])
    config = parse_args(command({**BASE, name: value}))
    found = [k for k, v in zip(defaults, vars(config).values(), strict=True) if v != defaults[k]]
    # the positive form of a flag that is on by default changes nothing
    assert found == ([] if name == "CleanWorkdir" else [setting])


def test_inputs_that_exclude_each_other():
    by_name = {group["id"]: group["members"] for group in DESCRIPTOR["groups"]}
    # a model may be given with a reference: methods by example take its networks
    assert by_name == {"CleanWorkdirOrNoCleanWorkdir": ["CleanWorkdir", "NoCleanWorkdir"]}


def test_exit_codes():
    codes = error_codes()
    assert [entry["code"] for entry in codes] == [int(c) for c in ExitCode if c]
    assert all(re.fullmatch(r"[A-Z].*\.", entry["description"]) for entry in codes)
    assert len({entry["description"] for entry in codes}) == len(codes)


def test_a_new_option_appears_by_itself():
    parser = argparse.ArgumentParser(prog="p", description="d")
    parser.add_argument("--new-thing", type=int, help="number")
    last = descriptor(parser)["inputs"][-1]
    assert (last["id"], last["type"], last["integer"]) == ("NewThing", "Number", True)


def test_container_recipe_has_this_version():
    recipe = (Path(__file__).parent.parent / "Dockerfile").read_text()
    assert re.search(r"^ARG VERSION=(.*)$", recipe, re.MULTILINE)[1] == __version__
    assert not re.search(r"^ENV[^#]*\bHOME=", recipe, re.MULTILINE)

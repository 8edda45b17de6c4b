"""Methods are found by their cards, plug-ins included, without importing any."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from bids_harmony.errors import UsageError
from bids_harmony.methods import registry
from bids_harmony.methods.base import Volume
from bids_harmony.methods.histogram_matching import HistogramMatching
from bids_harmony.methods.options import MethodOption, options_for

METHODS = sorted(registry.available())


def test_built_in_methods_have_a_card_each():
    cards = registry.available()
    assert {"histogram-matching", "nyul", "ssimh", "wm-peak", "zscore"} <= cards.keys()
    for name, card in cards.items():
        assert registry.load(name).name == card.name == name
        assert card.summary.endswith(".")
        assert card.citation


def test_cards_are_read_without_importing_any_method():
    code = """
        import sys
        from bids_harmony.methods.registry import available
        available()
        heavy = {"torch", "scipy", "ants", "numpy", "nibabel", "nipype"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_table_has_a_row_per_method():
    rows = registry.methods_table().strip().splitlines()
    assert len(rows) == len(METHODS) + 2
    assert len({row.count("|") for row in rows}) == 1
    assert any(row.startswith("| `ssimh` | statistical | T1w, T2w, FLAIR") for row in rows)


PLUGIN = """
from bids_harmony.methods.zscore import ZScore
from bids_harmony.metrics.similarity import edge_correlation, rank_agreement, wasserstein


class Fancy(ZScore):
    name = "fancy"
"""
CARD = """
name = "fancy"
title = "Fancy"
summary = "A plug-in."
kind = "statistical"
modalities = ["T1w"]
sites_to_train = 1
paired = false
labels = false
grid = "native"
memory_gb = 0.5
devices = ["cpu"]
monotone = true
status = "experimental"
citation = "Nobody 2020."
"""
OPTION = """
[[options]]
name = "speed"
level = "train"
default = 1
minimum = 0
maximum = 2
summary = "how fast"
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Install a distribution with one file, one card and one entry point."""

    def install(dist, module="plug.deep.fancy_method", name="fancy", card=CARD, source=PLUGIN):
        root = tmp_path / dist
        *packages, stem = module.split(".")
        folder = root.joinpath(*packages)
        folder.mkdir(parents=True)
        for depth in range(1, len(packages) + 1):
            # Reading the card must not run the package.
            init = root.joinpath(*packages[:depth]) / "__init__.py"
            init.write_text("import builtins\nbuiltins.plugin_was_imported = True\n")
        (folder / f"{stem}.py").write_text(source)
        if card:
            (folder / f"{name}.toml").write_text(card)
        info = root / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(
            f"[bids_harmony.methods]\n{name} = {module}:Fancy\n"
        )
        monkeypatch.syspath_prepend(str(root))
        for loaded in [key for key in sys.modules if key.split(".")[0] == packages[0]]:
            monkeypatch.delitem(sys.modules, loaded)

    return install


def test_plugin_is_found_and_loaded(plugin):
    import builtins

    plugin("fancy_dist")
    data = np.random.default_rng(0).uniform(0.2, 1, (6, 6, 6)).astype(np.float32)
    scan = Volume(data, np.ones(data.shape, bool), "T1w")
    card = registry.available()["fancy"]
    assert (card.target, card.status) == ("plug.deep.fancy_method:Fancy", "experimental")
    assert not hasattr(builtins, "plugin_was_imported")
    try:
        model = registry.load("fancy").fit([scan], seed=0)
    finally:
        del builtins.plugin_was_imported
    assert model.harmonize(scan, seed=0).data == pytest.approx(scan.data, abs=1e-6)
    assert "| `fancy` |" in registry.methods_table()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "nyul", "card": CARD.replace("fancy", "nyul")}, "two methods are named 'nyul'"),
        ({"card": ""}, "fancy.toml: the method card of 'fancy' cannot be read"),
        ({"card": CARD.replace('"fancy"', '"other"')}, "the card is named 'other'"),
        ({"card": CARD.replace('grid = "native"', "")}, "lacks grid"),
        ({"card": CARD + 'colour = "red"\n'}, "unknown fields colour"),
        ({"card": CARD.replace("paired = false", 'paired = "no"')}, "paired must be bool"),
        ({"card": CARD.replace("memory_gb = 0.5", "memory_gb = true")}, "memory_gb must be float"),
        ({"card": CARD.replace('["cpu"]', "[1]")}, "devices must be"),
        ({"card": CARD.replace('"statistical"', '"magic"')}, "kind must be"),
        ({"card": "name = "}, "not valid TOML"),
        ({"card": CARD.replace('"statistical"', '"neural"')}, "presets are for neural methods"),
        ({"card": CARD + 'presets = ["cpu"]\n'}, "presets are for neural methods"),
        ({"card": CARD + "adapts = true\n"}, "only neural methods adapt"),
        ({"card": CARD + OPTION}, "only neural methods adapt to sites or have options"),
        ({"card": CARD + "options = 3\n"}, "options must be tables"),
        ({"card": CARD + OPTION.replace("default = 1", "default = 3")}, "in the range and on a"),
        ({"card": CARD + OPTION + "step = 0.7\n"}, "in the range and on a"),
        ({"card": CARD + OPTION + "step = -1\n"}, "step 0 or a part"),
        ({"card": CARD + OPTION + "step = 5e-324\n"}, "step 0 or a part"),
        ({"card": CARD + OPTION + "step = nan\n"}, "step must be finite"),
        ({"card": CARD + OPTION.replace('"train"', '"group"')}, "level must be train or part"),
        ({"card": CARD + OPTION.replace("default = 1", 'default = "a"')}, "must be float, not"),
        ({"card": CARD + OPTION.replace("maximum", "most")}, "lacks or has too much"),
        ({"card": CARD + OPTION + OPTION}, "two options of the method card have one name"),
    ],
)
def test_broken_plugins_are_named(plugin, kwargs, message):
    plugin("broken_dist", **kwargs)
    with pytest.raises(UsageError, match=message):
        registry.available()


def test_two_plugins_with_one_name(plugin):
    plugin("dist_one", module="plug_one.fancy")
    plugin("dist_two", module="plug_two.fancy")
    with pytest.raises(UsageError, match=r"dist_(one|two).*dist_(one|two).*uninstall one"):
        registry.available()


def test_a_missing_module_is_named(plugin, tmp_path):
    plugin("ghost_dist", module="ghost.method")
    (tmp_path / "ghost_dist" / "ghost" / "method.py").unlink()
    with pytest.raises(UsageError, match=r"ghost_dist offers a method in ghost\.method"):
        registry.available()


def test_load_says_what_is_wrong(plugin):
    with pytest.raises(UsageError, match=r"no method is named 'nyull'; choose from .*nyul"):
        registry.load("nyull")
    plugin("bad_dist", source="import no_such_module\n")
    with pytest.raises(UsageError, match="cannot be loaded: No module named 'no_such_module'"):
        registry.load("fancy")


def test_what_a_method_needs_is_told_before_it_is_imported(plugin):
    more = 'needs = ["numpy", "no_such_torch", "nor_this"]\ninstall = "fancy[neural]"\n'
    plugin("needy_dist", card=CARD + more, source="import no_such_torch\n")
    told = r"needs no_such_torch, nor_this, not installed here: pip install 'fancy\[neural\]'$"
    with pytest.raises(UsageError, match=told):
        registry.load("fancy")


def test_card_and_class_must_agree(plugin):
    card = CARD.replace('"statistical"', '"neural"') + 'presets = ["cpu"]\n'
    plugin("odd_dist", card=card)
    with pytest.raises(UsageError, match="differ in kind, adapts, by_example, presets or options"):
        registry.load("fancy")


def test_an_option_that_the_class_has_not_is_told(plugin):
    card = CARD.replace('"statistical"', '"neural"') + 'presets = ["cpu", "paper"]\n' + OPTION
    source = (
        "from bids_harmony.methods.base import NeuralMethod\n"
        "class Fancy(NeuralMethod):\n    name = 'fancy'\n    train_options = {'speed': 2.0}\n"
    )
    plugin("odd_dist", card=card, source=source)
    with pytest.raises(UsageError, match="presets or options; repair the card"):
        registry.load("fancy")


def test_an_option_of_another_level_is_told(plugin):
    card = CARD.replace('"statistical"', '"neural"') + 'presets = ["cpu", "paper"]\n'
    source = (
        "from bids_harmony.methods.base import NeuralMethod\n"
        "class Fancy(NeuralMethod):\n    name = 'fancy'\n    train_options = {'speed': 1.0}\n"
    )
    plugin("odd_dist", card=card + OPTION.replace("train", "participant"), source=source)
    with pytest.raises(UsageError, match="presets or options; repair the card"):
        registry.load("fancy")


def test_an_option_in_steps_takes_no_number_between():
    option = MethodOption("speed", "train", 0.5, 0.2, 0.8, "how fast", step=0.3)
    allowed = [v for v in (0.2, 0.3, 0.5, 0.51, 0.8, 1.1) if option.allows(v)]
    assert allowed == [0.2, 0.5, 0.8]
    given = options_for("fancy", [option], "train", ["speed=0.79999999"])
    assert given == {"speed": pytest.approx(0.8, abs=1e-12)}  # on the step, not beside it
    with pytest.raises(UsageError, match=r"from 0\.2 to 0\.8 in steps of 0\.3"):
        options_for("fancy", [option], "train", ["speed=0.3"])


def test_options_are_in_the_documentation():
    assert "| `hail` | `consistency` | train | 1 | 0 to 100 |" in registry.options_table()


def test_load_refuses_what_is_not_a_method(plugin):
    plugin("odd_dist", source="class Fancy:\n    name = 'fancy'\n")
    with pytest.raises(UsageError, match="not a harmonization method"):
        registry.load("fancy")


def test_classes_are_those_of_the_cards():
    assert registry.load("histogram-matching") is HistogramMatching

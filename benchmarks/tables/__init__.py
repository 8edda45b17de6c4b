"""One module per benchmark table."""

from __future__ import annotations

from benchmarks.harness import Table, Trial
from benchmarks.tables.blindharmony import BlindHarmony
from benchmarks.tables.real_pair import RealPair
from benchmarks.tables.travelling import ByExample, Travelling

TABLES: dict[str, Table] = {
    t.name: t for t in (BlindHarmony(), Travelling(), RealPair(), ByExample())
}
_BOTH = ("--preset", "cpu", "--modality", "T1w", "T2w")

TRIALS: dict[str, Trial] = {
    t.label: t
    for t in (
        Trial("none", None),
        Trial("histogram-matching", "histogram-matching"),
        Trial("ssimh", "ssimh"),
        Trial("nyul", "nyul"),
        Trial("zscore", "zscore"),
        Trial("wm-peak", "wm-peak"),
        Trial("harmonizing-flows", "harmonizing-flows", ("--preset", "cpu"), neural=True),
        Trial("blindharmony", "blindharmony", ("--preset", "cpu"), neural=True),
        Trial("hail", "hail", ("--preset", "cpu"), neural=True),
        Trial("calamiti", "calamiti", _BOTH, neural=True),
        Trial("dewey2020", "dewey2020", _BOTH, neural=True),
    )
}

"""One module per benchmark table."""

from __future__ import annotations

from benchmarks.harness import Table
from benchmarks.tables import blindharmony, by_example, real_sites, real_tissues, tissues
from benchmarks.tables.lesions import Lesions
from benchmarks.tables.real_lesions import RealLesions
from benchmarks.tables.real_pair import RealPair
from benchmarks.tables.travelling import Travelling
from benchmarks.trials import Trial

TABLES: dict[str, Table] = {
    t.name: t
    for t in (
        blindharmony.BlindHarmony(),
        Travelling(),
        RealPair(),
        by_example.ByExample(),
        real_sites.RealSites(),
        Lesions(),
        RealLesions(),
        tissues.Tissues(),
        real_tissues.RealTissues(),
    )
}
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
        *blindharmony.TRIALS,
        *by_example.TRIALS,
        *real_sites.TRIALS,
        *tissues.TRIALS,
        *real_tissues.TRIALS,
    )
}

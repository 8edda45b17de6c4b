"""Harmonization methods behind one contract."""

"""bids_harmony: a BIDS App that harmonizes multi-site brain MRI."""

from bids_harmony._version import __version__

__all__ = ["__version__"]

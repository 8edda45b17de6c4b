"""The version, alone so that packaging and `--version` read it at no cost."""

__version__ = "0.1.0"

"""The version of this package, which all ranks of a run must have."""

__version__ = "0.1.0"

"""Hostile values at every public door: none may hang, take memory without bound, or raise what is not documented."""

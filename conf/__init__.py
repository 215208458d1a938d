"""Hydra configuration: config.yaml, its groups and the committed sweeps in experiment/."""

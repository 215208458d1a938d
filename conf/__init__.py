"""Hydra configuration: a file for each verb (train.yaml is also the sweeps'), the groups, the committed sweeps."""

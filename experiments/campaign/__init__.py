"""Everything that has to be measured on a GPU, in one command a sitting: `python -m flashcp.experiments.campaign`.

Minutes on a GPU are rare: parts stand in the order of their value, each has a bound in time, each case is caught by
itself in a process of its own, and rows are written as soon as they are there. Needs neither hydra nor omegaconf.
"""

"""The command line, sweeps, the simulator, benchmarks and the pages they write."""

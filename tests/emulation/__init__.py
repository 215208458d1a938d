"""GPUs that are not there: devices whose streams, SMs and memory are emulated, for `flashcp/comm/fabrics/cuda.py`."""

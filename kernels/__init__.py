"""Attention on packed documents: the float64 reference, the CPU implementation, tile schedules, Triton kernels."""

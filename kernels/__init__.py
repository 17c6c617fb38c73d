"""Triton kernels, one file an op; installed as depthlstm_fast.kernels and imported when one first runs."""

"""Triton kernels, one file for each op.

The package is installed as depthlstm_fast.kernels. The first run of an op imports its file.
"""

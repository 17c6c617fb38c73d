"""A simulator that runs CUDA kernels on the CPU, exactly as nvcc or Triton compiled them.

Their PTX becomes C++, and a fiber runs each CUDA thread. build.py makes a shared library of .cu files or of PTX.
translate.py turns PTX into C++, one instruction at a time by the table in instructions.py. runtime/ has the functions
that the C++ calls: arithmetic, memory, barriers, and a stand-in for the CUDA runtime.
"""

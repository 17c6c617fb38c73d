"""Code shared by the Triton kernels: compiling and launching, tiles, formulas, tuning, the interpreter."""

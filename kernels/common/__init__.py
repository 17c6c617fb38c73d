"""What the Triton kernels share: compiling and launching, tiles, formulas, tuning, the interpreter."""

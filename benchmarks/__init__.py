"""The benchmark suite: `make bench`, or `python benchmarks/run.py`. See benchmarks/README.md."""

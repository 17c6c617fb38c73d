"""`python -m depthlstm_fast.bench.gpu`: what `make gpu` runs."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())

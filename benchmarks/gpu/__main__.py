"""`python -m depthlstm_fast.bench.gpu`: the command of `make gpu`."""

import sys

from .run import main

if __name__ == "__main__":
    sys.exit(main())

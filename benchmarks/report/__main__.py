"""`python -m depthlstm_fast.bench.report`: a run as Markdown, printed or put into a README."""

import sys

from .tables import main

if __name__ == "__main__":
    sys.exit(main())

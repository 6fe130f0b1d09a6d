"""`python -m hf_in2core.report RUN`."""

import sys

from .terminal import main


if __name__ == "__main__":
    sys.exit(main())

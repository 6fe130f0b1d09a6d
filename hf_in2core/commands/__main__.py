"""What `in2core` launches: a command in a process that accelerate has started."""

import os
import sys

from .main import run_here


if __name__ == "__main__":
    os.environ.pop("PYTHONSAFEPATH", None)  # it was for this process alone, see launch.py
    run_here(sys.argv[1], sys.argv[2:])

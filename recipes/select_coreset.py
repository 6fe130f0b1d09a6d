"""The command `select` of hf_in2core, under the name it has in this repository."""

import sys


# Python puts this folder first on its path, where evaluate.py would be taken for the `evaluate` library.
sys.path.append(sys.path.pop(0))

from hf_in2core.commands import select


if __name__ == "__main__":
    select.make_parser().run(select.main)

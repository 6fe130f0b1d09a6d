"""The command `score` of hf_in2core, under the name it has in this repository."""

import sys


# Python puts this folder first on its path, where evaluate.py would be taken for the `evaluate` library.
sys.path.append(sys.path.pop(0))

from hf_in2core.commands import score


if __name__ == "__main__":
    score.make_parser().run(score.main)

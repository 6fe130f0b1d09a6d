"""The whole story on a model and data made on the spot, offline, in a few minutes on a CPU.

    in2core demo

`in2core run` on the quickstart, into runs/quickstart/ of the folder you are in; its flags are those of `in2core run`.
"""

from hf_in2core.pipeline.parser import make_run_parser
from hf_in2core.shipped import find_shipped

from .run import main


__all__ = ["PARSER", "main"]


PARSER = make_run_parser(__doc__, "demo", find_shipped("recipes/quickstart/in2core.yaml"))

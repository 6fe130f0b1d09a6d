"""`in2core run`, for `accelerate launch recipes/in2core.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("run")

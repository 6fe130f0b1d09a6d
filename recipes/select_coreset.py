"""`in2core select`, for `accelerate launch recipes/select_coreset.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("select")

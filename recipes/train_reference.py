"""`in2core train-reference`, for `accelerate launch recipes/train_reference.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("train-reference")

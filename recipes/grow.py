"""`in2core grow`, for `accelerate launch recipes/grow.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("grow")

"""`in2core score`, for `accelerate launch recipes/score_influence.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("score")

"""`in2core evaluate`, for `accelerate launch recipes/evaluate.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("evaluate")

"""`in2core publish`, for `accelerate launch recipes/publish.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("publish")

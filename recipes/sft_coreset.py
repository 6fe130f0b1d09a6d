"""`in2core sft`, for `accelerate launch recipes/sft_coreset.py …` in a checkout."""

from hf_in2core.commands.main import run_script


if __name__ == "__main__":
    run_script("sft")

"""Launched by test_processes.py and test_resume.py: one run of fit and score on a fixed tiny model."""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_trainer  # noqa: E402

from hf_in2core import InfluenceTrainer  # noqa: E402
from hf_in2core.analysis.coverage import compute_coverage  # noqa: E402
from hf_in2core.analysis.layers import compute_layer_scores  # noqa: E402


def main() -> None:
    options = json.loads(sys.argv[1])
    dtype = getattr(torch, options.pop("dtype", "float32"))
    expected, out, num_rows = options.pop("world_size"), Path(options.pop("out")), options.pop("num_rows")
    fail_rank, fail_in_pass = options.pop("fail_rank", None), options.pop("fail_in_pass", False)
    analyse, adapter_seed = options.pop("analyse", False), options.pop("adapter_seed", 1)
    pool, validation = make_prompt_completion(num_rows, seed=0), make_prompt_completion(5, seed=1)
    trainer = make_trainer(
        options.pop("output_dir"),
        pool,
        validation,
        dtype,
        model=add_trained_adapter(make_model(num_layers=3), seed=adapter_seed),
        **options,
    )
    actual = trainer.accelerator.num_processes
    if actual != expected:
        raise SystemExit(f"{actual} processes where {expected} were expected")
    if fail_rank == trainer.accelerator.process_index:
        if not fail_in_pass:
            raise RuntimeError("this rank fails on purpose")
        # Found by this rank's check of its gradients, while the others go on and wait for its sums.
        trainer.model.base_model.merge_adapter()
    scored = trainer.score_influence()
    config = trainer.fit_influence().config
    told = {"fit": {name: getattr(config, name) for name in ("num_fit_examples", "fit_agreement", "exact_agreement")}}
    analysed = compute_the_rest(trainer) if analyse else {}
    values = [None if value is None else value.hex() for value in scored["influence"]]
    result = {"influence": values, "rank": scored["influence_rank"], "id": scored["id"], "pid": os.getpid()}
    out.with_suffix(f".{trainer.accelerator.process_index}.json").write_text(
        json.dumps({k: list(v) if k != "pid" else v for k, v in result.items()} | analysed | told)
    )


def compute_the_rest(trainer: InfluenceTrainer) -> dict[str, list[float]]:
    """What else is computed with a trainer, on every process."""
    adapter = Path(str(trainer.args.output_dir)) / "saved"
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(str(adapter))
    trainer.accelerator.wait_for_everyone()
    layers = compute_layer_scores(trainer)
    averaged = trainer.score_influence(checkpoints=[adapter])
    coverage = compute_coverage(trainer, top_k=3)
    return {
        "layers": layers.parts.ravel().tolist(),
        "averaged": averaged["influence"][:],
        "coverage": coverage["coverage_sum"][:],
        "loss": coverage["loss"][:],
    }


if __name__ == "__main__":
    main()

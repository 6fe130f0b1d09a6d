"""Launched by test_fsdp.py: reference, influence and coreset with base and adapter sharded by accelerate's FSDP2."""

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from accelerate import PartialState  # noqa: E402
from helpers import make_config, make_prompt_completion, make_tokenizer  # noqa: E402
from peft import LoraConfig, PeftModel  # noqa: E402
from sharded_on_cpu import shard_on_cpu  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from hf_in2core import InfluenceTrainer, select_coreset  # noqa: E402
from hf_in2core.analysis.coverage import compute_coverage  # noqa: E402
from hf_in2core.analysis.layers import compute_layer_scores  # noqa: E402
from hf_in2core.engine import budget, passes  # noqa: E402


VARIANTS: dict[str, dict[str, Any]] = {
    "uneven": {"chunk_size": 4, "tokens_per_batch": 60},
    "queries": {"query_memory_gb": 1e-6, "influence_activation_checkpointing": True},
    "last_layer_row_by_row": {"influence_layers": ["last:1"], "tokens_per_batch": 1},
    "one_row": {"num_rows": 1},
}


def make_trainer(model: Any, folder: str, **options: Any) -> InfluenceTrainer:
    pool = make_prompt_completion(options.pop("num_rows", 19), 0)
    validation = make_prompt_completion(options.pop("num_validation", 5), 1)
    args = make_config(
        folder,
        activation_checkpointing=False,
        learning_rate=2e-2,
        max_steps=4,
        save_steps=2,
        logging_steps=1,
        save_strategy="steps",
        **options,
    )
    return InfluenceTrainer(
        model=model,
        args=args,
        train_dataset=pool,
        eval_dataset=validation,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if isinstance(model, str) else None,
    )


def score_trained(model: str, adapter: str, folder: str, name: str) -> InfluenceTrainer:
    """Influence through a trained adapter, under one of the settings; called by the test too, for the same whole."""
    base = AutoModelForCausalLM.from_pretrained(model)
    trainer = make_trainer(PeftModel.from_pretrained(base, adapter, is_trainable=True), folder, **VARIANTS[name])
    trainer.fit_influence(per_example=name == "queries")
    trainer.pool = trainer.score_influence()
    return trainer


def check_sharded(trainer: InfluenceTrainer) -> None:
    parameters: list[Any] = list(trainer.model.parameters())
    assert all(isinstance(p, DTensor) and p.grad is None for p in parameters)
    assert sum(p.to_local().numel() for p in parameters) < 0.6 * sum(p.numel() for p in parameters)


def stop_second_process(after: int) -> None:
    """The process of rank 1 ends in the middle of the pass that follows, as if it had been killed."""
    run, batches = passes.run_batches, []

    def run_and_stop(*args: Any) -> None:
        batches.append(args)
        if len(batches) > after and PartialState().process_index == 1:
            os._exit(9)
        run(*args)

    passes.run_batches = run_and_stop  # type: ignore[assignment]


def score_same_rows(trainer: InfluenceTrainer) -> dict[str, Any]:
    """All that passes the same rows on every process: the fit's checks, single queries, layers, coverage."""
    found = {"influence": trainer.score_influence()["influence"][:]}
    found["agreement"] = trainer.fit_influence().config.validation_agreement
    found["layers"] = compute_layer_scores(trainer).parts.tolist()
    found["coverage"] = compute_coverage(trainer, top_k=3)["coverage_sum"][:]
    return found


def try_to_make(model: str, folder: str, **settings: Any) -> str:
    """What a trainer says of a setting of the launcher (in capitals) or of its own; nothing if it can be made."""
    variables = {name: value for name, value in settings.items() if name.isupper()}
    os.environ |= variables
    try:
        make_trainer(model, folder, **{name: value for name, value in settings.items() if name not in variables})
    except ValueError as error:
        return str(error)
    finally:
        for name in variables:
            del os.environ[name]
    return ""


def write(options: dict[str, Any], found: dict[str, Any]) -> None:
    Path(options["out"]).with_suffix(f".{PartialState().process_index}.json").write_text(json.dumps(found))


def main() -> None:
    options = json.loads(sys.argv[1])
    shard_on_cpu()
    state, model, folder = PartialState(), options["model"], options["output_dir"]
    assert state.num_processes == options["world_size"]
    if "budgets" in options:
        # Processes that wait for each other end here, and say where.
        faulthandler.dump_traceback_later(120, exit=True)
        # As two GPUs would measure them, of which one holds more than the other.
        budget.choose_forward_tokens = lambda given, device: options["budgets"][state.process_index]  # type: ignore[assignment]
        refused = {"layers": try_to_make(model, folder, FSDP_TRANSFORMER_CLS_TO_WRAP="NopeLayer")}
        refused["compiled"] = try_to_make(model, folder, torch_compile=True)
        trainer = make_trainer(model, folder, num_rows=40, num_validation=12)
        check_sharded(trainer)
        write(options, {"refused": refused, **score_same_rows(trainer)})
        return
    trainer = make_trainer(model, folder)
    check_sharded(trainer)
    trainer.train()
    check_sharded(trainer)
    adapter = f"{folder}/trained"
    trainer.save_model(adapter)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    found: dict[str, Any] = {"losses": losses, "adapter": adapter, "variants": {}}
    scored = trainer.score_influence()
    found["influence"], found["coreset"] = scored["influence"][:], select_coreset(scored, fraction=0.5)["id"][:]
    checkpoints = [f"{folder}/checkpoint-2", f"{folder}/checkpoint-4"]
    found["checkpoints"] = trainer.score_influence(checkpoints=checkpoints)["influence_per_checkpoint"][:]
    assert trainer.score_influence()["influence"][:] == found["influence"]  # its own adapter is back
    scorer = trainer.fit_influence()
    if state.is_main_process:
        scorer.save_pretrained(f"{folder}/scorer")
    resumed = make_trainer(model, f"{folder}-resumed")
    resumed.train(resume_from_checkpoint=checkpoints[0])
    found["resumed"] = resumed.score_influence()["influence"][:]
    for name in options.get("variants", VARIANTS):
        if options.get("stop_in") == name:
            stop_second_process(1)
        trainer = score_trained(model, adapter, f"{folder}-{name}", name)
        check_sharded(trainer)
        found["variants"][name] = {
            column: trainer.pool[column][:]
            for column in ("influence", "influence_per_query")
            if column in trainer.pool.column_names
        }
    write(options, found)


if __name__ == "__main__":
    main()

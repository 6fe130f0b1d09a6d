"""The influence passes on a GPU: tokens per second beside plain training steps, memory, precision, the published way.

python benchmarks/gpu.py [--quick] [--out benchmarks/results/gpu.json] [--only speed_0.6B ...]

Models have random weights, made on the device in the shapes of Qwen3-0.6B and Llama-2-7B; rows are 1,024 random
tokens, all of them with loss. Baseline and ours run in turn, in one process. A part that fails is written down with
its error and the others go on; the exit status then is 1. `--quick` runs tiny shapes, on the CPU where there is no
GPU: it shows that every part runs, and its figures mean nothing.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import describe_machine, make_parser
from datasets import disable_progress_bars
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import spearmanr
from speed import run_plain, run_published
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from workload import (
    compute_mean_gradients,
    make_passes,
    make_rows,
    make_tokenizer,
    make_topics,
    measure_error,
    run_fit_and_score,
    time_interleaved,
)

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.engine.budget import choose_tokens_per_batch
from hf_in2core.engine.fit_sums import fit_rows
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.influence.plan import plan_influence


RANK = 16


def make_shape(name: str, quick: bool) -> PretrainedConfig:
    """Configuration of a shape that people use."""
    if quick:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
        return (
            Qwen3Config(**small, **heads, tie_word_embeddings=True)
            if name == "0.6B"
            else LlamaConfig(**small, **heads)
        )
    if name == "0.6B":
        return Qwen3Config(
            **{"vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        )
    return LlamaConfig(
        **{"vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    )


def make_base(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> PreTrainedModel:
    """That shape with random weights, made on the device."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return (Qwen3ForCausalLM if name == "0.6B" else LlamaForCausalLM)(make_shape(name, quick))
    finally:
        torch.set_default_dtype(before)


def make_model(name: str, device: torch.device, dtype: torch.dtype, quick: bool) -> PeftModel:
    """That shape with a LoRA adapter (float32) on every linear."""
    base = make_base(name, device, dtype, quick)
    model = get_peft_model(base, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_" in parameter_name:
                parameter.data = parameter.data.to(device, torch.float32)
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.02)
    return model


def read_clock() -> float:
    """Seconds by the clock, when all that the device was asked for is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def read_peak() -> float | None:
    """Peak of the allocated device memory in GB (10^9 bytes)."""
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def measure_speed(name: str, device: torch.device, quick: bool) -> dict[str, Any]:
    """Tokens per second of plain steps and of the passes, each at its best batch, and their peak memory."""
    length = 32 if quick else 1024
    model = make_model(name, device, torch.bfloat16, quick)
    vocab_size = model.config.vocab_size
    passes = make_passes(model, autocast=torch.bfloat16, chunk_size=100_000)
    v = compute_mean_gradients(passes, make_rows(2, vocab_size, length, length, prompt=0.0, seed=1))
    directions = {key: value.float() for key, value in v.items()}
    damping = dict.fromkeys(passes.blocks, 1e-6)
    chosen = 4 * length if quick else choose_tokens_per_batch(passes, 1)
    found: dict[str, Any] = {"shape": name, "chosen_tokens_per_batch": chosen, "batches": []}
    sizes = sorted({2, 4} if quick else {4, 8, chosen // length // 2, chosen // length})
    total = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
    for size in sizes:
        rows = make_rows(2 * size, vocab_size, length, length, prompt=0.0)
        passes.tokens_per_batch = size * length
        works: dict[str, Callable[[], object]] = {
            "plain": lambda rows=rows, size=size: run_plain(model, rows, size * length, autocast=torch.bfloat16),
            "score": lambda rows=rows: run_score_pass(passes, rows, directions, cosine=False),
            "fit": lambda rows=rows: fit_rows(passes, "fit", rows, None, v, damping, 0.1, False),
            "validation": lambda rows=rows: compute_mean_gradients(passes, rows),
        }
        entries = {what: {"what": what, "tokens_per_batch": size * length} for what in works}
        for what in list(works):
            free()
            try:
                works[what]()
            except torch.OutOfMemoryError:
                entries[what]["error"] = "out of memory"
                del works[what]
            entries[what]["peak_gb"] = read_peak()
        seconds = time_interleaved(works, 1 if quick else 3, read_clock, not_counted=0)
        for what, value in seconds.items():
            entries[what]["tokens_per_second"] = len(rows) * length / value
        found["batches"] += entries.values()
        print(*entries.values(), sep="\n", flush=True)
        if passes.tokens_per_batch != size * length:
            found["halved_at"] = size * length  # a pass has run out of memory and halved its batches
            break
    best = {
        what: max(entry.get("tokens_per_second", 0.0) for entry in found["batches"] if entry["what"] == what)
        for what in ("plain", "score", "fit", "validation")
    }
    found["best_tokens_per_second"] = best
    found["of_plain"] = {what: value / best["plain"] for what, value in best.items()}
    peaks = [entry["peak_gb"] for entry in found["batches"] if entry["what"] == "fit" and entry["peak_gb"]]
    if peaks:
        found["peak_of_device_memory"] = peaks[-1] * 1e9 / total
    return found


def measure_precision(device: torch.device, quick: bool) -> dict[str, Any]:
    """Scores by a bfloat16 base and by a float32 one of the same values, and the published way beside ours."""
    num_rows, num_validation, length = (12, 3, 32) if quick else (200, 20, 512)
    model = make_model("0.6B", device, torch.bfloat16, quick)
    vocab_size = model.config.vocab_size
    rows = make_topics(num_rows, vocab_size, length, seed=0)
    held_out = make_topics(num_validation, vocab_size, length, seed=1, topics=1)
    scores: dict[str, np.ndarray] = {}
    seconds: dict[str, float] = {}

    def keep(name: str, work: Callable[[], np.ndarray]) -> None:
        start = read_clock()
        scores[name] = work()
        seconds[name] = read_clock() - start

    passes = make_passes(model, autocast=torch.bfloat16)
    passes.tokens_per_batch = choose_tokens_per_batch(passes, 1)

    def ours(passes: Passes) -> np.ndarray:
        return run_fit_and_score(passes, rows, compute_mean_gradients(passes, held_out))[:, 0]

    keep("warm-up", partial(ours, passes))
    keep("bf16", partial(ours, passes))
    for mean in (True, False) if quick else (True,):
        free()
        name = "published, one mean query" if mean else "published, queries one by one"
        keep(name, lambda mean=mean: run_published(model, rows, held_out, mean=mean, autocast=torch.bfloat16))
    free()
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    keep("float32", partial(ours, make_passes(model, 8192)))

    def compare(one: str, other: str) -> dict[str, float]:
        found, exact = scores[one], scores[other]
        return {"spearman": float(spearmanr(found, exact).statistic), "relative": measure_error(found, exact)}

    published = "published, one mean query"
    return {
        "rows": num_rows,
        "validation_rows": num_validation,
        "tokens_per_row": length,
        "seconds": seconds,
        "published_over_ours": seconds[published] / seconds["bf16"],
        "bf16_and_float32": compare("bf16", "float32"),
        "ours_and_published": compare("bf16", published),
    }


def measure_trainer(device: torch.device, quick: bool) -> dict[str, Any]:
    """The whole trainer on the device: SFT, plan, fit, scores; in float32 its scores beside those of the CPU."""
    found: dict[str, Any] = {}
    for name, mixed in (("float32", False), ("bf16", True), ("0.6B", True)):
        torch.manual_seed(0)
        if name == "0.6B":
            model, length, num_rows = make_base(name, device, torch.bfloat16, quick), 32 if quick else 1024, 128
        else:
            config = LlamaConfig(
                **{"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4},
                **{"num_attention_heads": 4, "num_key_value_heads": 2},
            )
            model, length, num_rows = LlamaForCausalLM(config), 48, 200
        vocab_size = min(model.config.vocab_size, 1024)
        with tempfile.TemporaryDirectory() as folder:
            trainer = InfluenceTrainer(
                model=model,
                args=InfluenceConfig(
                    **{"output_dir": folder, "bf16": mixed, "report_to": "none", "disable_tqdm": True},
                    **{"max_steps": 2 if quick or name == "0.6B" else 20, "save_strategy": "no"},
                    **{"learning_rate": 1e-3, "use_cpu": device.type == "cpu", "max_length": None},
                ),
                train_dataset=make_topics(24 if quick else num_rows, vocab_size, length, 0).remove_columns("row"),
                eval_dataset=make_topics(8, vocab_size, length, 1, topics=1).remove_columns("row"),
                processing_class=make_tokenizer(vocab_size),
                peft_config=LoraConfig(r=8, target_modules="all-linear"),
            )
            start = time.perf_counter()
            trainer.train()
            trained = time.perf_counter()
            free()
            planning = time.perf_counter()
            plan = plan_influence(trainer)
            planned = time.perf_counter()
            free()
            scores = np.array(trainer.score_influence()["influence"])
            scored = time.perf_counter()
            entry: dict[str, Any] = {
                "train_seconds": trained - start,
                "plan_seconds": planned - planning,
                "planned_seconds": plan.seconds,
                "seconds": scored - planned,
                "planned_peak_gb": plan.peak_memory / 1e9,
                "peak_gb": read_peak(),
            }
            if name == "float32":
                model = trainer.accelerator.unwrap_model(trainer.model).cpu()
                passes = make_passes(model, 4096)
                expected = run_fit_and_score(
                    passes,
                    trainer.prepared_pool,
                    compute_mean_gradients(passes, trainer.prepared_validation["validation"]),
                )[:, 0]
                entry["relative_to_cpu"] = measure_error(scores, expected)
                entry["spearman_with_cpu"] = float(spearmanr(scores, expected).statistic)
            found[name] = entry
    return found


def measure_queries(device: torch.device, quick: bool) -> dict[str, Any]:
    """Every validation row a query, in blocks as large as the device's memory allows."""
    model = make_model("0.6B", device, torch.bfloat16, quick)
    vocab_size, length = min(model.config.vocab_size, 1024), 32 if quick else 512
    with tempfile.TemporaryDirectory() as folder:
        trainer = InfluenceTrainer(
            model=model,
            args=InfluenceConfig(
                **{"output_dir": folder, "bf16": True, "report_to": "none", "disable_tqdm": True, "max_length": None},
                use_cpu=device.type == "cpu",
            ),
            train_dataset=make_topics(12 if quick else 64, vocab_size, length, 0).remove_columns("row"),
            eval_dataset=make_topics(4 if quick else 128, vocab_size, length, 1, topics=1).remove_columns("row"),
            processing_class=make_tokenizer(vocab_size),
        )
        chosen = trainer.make_passes(trainer.blocks, "").tokens_per_batch
        free()
        start = time.perf_counter()
        trainer.fit_influence(per_example=True)
        scores = np.array(trainer.score_influence()["influence_per_query"])
        seconds = time.perf_counter() - start
        return {
            "queries": scores.shape[1],
            "queries_per_block": trainer.count_queries_per_block(trainer.blocks),
            "tokens_per_batch": [chosen, trainer.make_passes(trainer.blocks, "").tokens_per_batch],
            "seconds": seconds,
            "peak_gb": read_peak(),
        }


def measure_sharded(device: torch.device, quick: bool) -> dict[str, Any]:
    """
    The launcher's own FSDP path, where there are two devices, and ZeRO-3's where DeepSpeed is installed.

    Raises:
        RuntimeError: with the end of what a launch said, if it failed.
    """
    if torch.cuda.device_count() < 2:
        return {"skipped": f"{torch.cuda.device_count()} GPU(s): `accelerate launch` with FSDP2 needs two"}
    root, found = Path(__file__).resolve().parent.parent, {}
    for name in ("fsdp", *["zero3"] * (find_spec("deepspeed") is not None)):
        config = root / "recipes" / "accelerate_configs" / f"{name}.yaml"
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
            command += ["--config_file", str(config), str(root / "recipes/in2core.py")]
            command += ["--config", str(root / "recipes/quickstart/in2core.yaml"), "--output_dir", folder]
            done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=root)
        end = (done.stdout + done.stderr)[-2000:]
        if done.returncode != 0:
            raise RuntimeError(f"The launch with {config.name} ended with {done.returncode}: {end}")
        found[name] = {"returncode": 0, "end": end}
    return found


PARTS: dict[str, Callable[[torch.device, bool], dict[str, Any]]] = {
    "sharded": measure_sharded,
    "trainer": measure_trainer,
    "speed_0.6B": partial(measure_speed, "0.6B"),
    "speed_7B": partial(measure_speed, "7B"),
    "precision": measure_precision,
    "queries": measure_queries,
}


def main() -> None:
    parser = make_parser(__doc__, "Tiny shapes: shows that it runs, not how fast.")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu.json"))
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="Parts to run.")
    args = parser.parse_args()
    disable_progress_bars()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not args.quick:
        parser.error("there is no GPU here. Run it where there is one, or see that it runs with --quick.")
    found: dict[str, Any] = {"machine": describe_machine(), "quick": args.quick}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in args.only:
        free()
        start = time.perf_counter()
        try:
            found[name] = PARTS[name](device, args.quick)
        except Exception as error:
            traceback.print_exc()
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            failed.append(name)
        found[name]["wall_seconds"] = time.perf_counter() - start
        args.out.write_text(json.dumps(found, indent=2) + "\n")
        shown = {key: value for key, value in found[name].items() if key != "batches"}
        print(f"## {name}\n{json.dumps(shown, indent=1)}", flush=True)
        for entry in found[name].get("batches", []):
            print(entry, flush=True)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()

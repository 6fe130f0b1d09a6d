"""The plan against measured small runs, and the same arithmetic on paper for large models and pools.

python benchmarks/plan.py [--quick] [--output_dir benchmarks/results] [--tflops 300]

Paper: one batch of the score pass runs on tensors without data (PyTorch's meta device), which counts its
floating-point operations and the activations that it keeps; the rest is sizes. What a machine reaches of its peak is
not known on paper: `--tflops` is an assumption, and the small runs below it use what another small run reached.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from common import make_parser, report, set_up
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from workload import make_config, make_model, make_passes, make_rows, make_trainer, measure_apart

from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.fit import run_fit_pass
from hf_in2core.engine.gradients import GradientRecorder, Gradients, form_gradients
from hf_in2core.influence.plan import plan_influence


VOCAB_SIZE = 4096
LENGTH, BUDGET = 512, 8192
# What a process has before a model is loaded, measured by itself.
IMPORTED = "imported"


def count_on_paper(
    config: LlamaConfig, rank: int, batch_size: int, length: int, labelled: float, dtype: torch.dtype
) -> dict[str, float]:
    """Operations per token of one pass and the bytes that it holds, from a batch without data."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear"), autocast_adapter_dtype=True)
    blocks = find_blocks(model, "default")
    model_tensors = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # Fused attention keeps no [length, length] probabilities, unlike the one of the meta device.
        if storage._cdata not in model_tensors and tuple(tensor.shape[-2:]) != (length, length):
            kept[storage._cdata] = storage
        return tensor

    def reduce(name: str, found: Gradients) -> None:
        form_gradients(found, torch.float32)

    tokens = batch_size * length
    positions = torch.zeros(int(tokens * labelled), dtype=torch.long, device="meta")
    with GradientRecorder(model, blocks) as recorder:
        recorder._batch_shape, recorder._reducer = (batch_size, length), reduce

        def keep_labelled(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            return (args[0].flatten(0, 1).index_select(0, positions),)

        model.get_output_embeddings().register_forward_pre_hook(keep_labelled)
        ids = torch.zeros(batch_size, length, dtype=torch.long, device="meta")
        mask = torch.ones(batch_size, 1, length, length, dtype=torch.bool, device="meta")
        with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            F.cross_entropy(logits, positions, reduction="sum").backward()
    adapter = sum(block.tensor.numel() for block in blocks.values())
    logits_bytes = len(positions) * config.vocab_size * 4
    # v and its copy in the precision of the gradients, the weighted sum and u in float64.
    adapter_copies = adapter * (8 + 4 + 8 + 8)
    activations = sum(storage.nbytes() for storage in kept.values())
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    return {
        "flops": flops.get_total_flops() / tokens,
        "weights": weights,
        "activations": activations,
        # The log-probabilities are among the activations; the logits and their gradient come on top.
        "memory": weights + activations + 2 * logits_bytes + adapter_copies,
        "adapter": adapter,
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
    }


def load_kernels() -> None:
    """Run one tiny batch, since the first use of a kernel loads libraries that no arithmetic on paper knows."""
    model = make_model(64, 1, 64)
    passes = make_passes(model)
    v = {name: block.tensor.detach()[None] for name, block in passes.blocks.items()}
    run_fit_pass(passes, make_rows(2, 64, 4, 8), v, 0.1, None, 0)


def measure(folder: str, num_rows: int, width: int, layers: int) -> dict[str, float]:
    """Plan a small run, then run it, by the trainer as users call it; CPU seconds of both."""
    load_kernels()
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows, held_out = make_rows(num_rows, VOCAB_SIZE, 32, 128), make_rows(16, VOCAB_SIZE, 32, 128, seed=1)
    model = make_model(width, layers, VOCAB_SIZE)
    trainer = make_trainer(Path(folder), model, rows, held_out, tokens_per_batch=4096)
    plan = plan_influence(trainer, clock=time.process_time)
    start = time.process_time()
    trainer.score_influence()
    seconds = time.process_time() - start
    files = Path(folder, "influence").rglob("*.safetensors")
    return {
        "planned seconds": plan.seconds,
        "seconds": seconds,
        "planned memory": plan.peak_memory,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "planned disk": plan.disk,
        "disk": sum(path.stat().st_size for path in files),
        "tokens": sum(item.tokens for item in plan.passes),
        IMPORTED: imported,
    }


def compare(num_rows: int, models: list[tuple[int, int]]) -> list[dict[str, object]]:
    """Plan and paper against small runs; the paper's speed is the one that the first run reached."""
    table: list[dict[str, object]] = []
    speed = 0.0
    for width, layers in models:
        with tempfile.TemporaryDirectory() as folder:
            # glibc's heap keeps holes of freed tensors, which is half of the peak and not ours to predict; blocks over
            # a megabyte go back to the system at once with this.
            arguments = [folder, num_rows, width, layers]
            found = measure_apart(__file__, arguments, MALLOC_MMAP_THRESHOLD_="1000000")
        what = f"width {width}, {layers} layers, {num_rows} rows"
        # 80 tokens on average, about as many as fill the budget of 4096.
        paper = count_on_paper(make_config(width, layers, VOCAB_SIZE), 8, 32, 128, 0.7, torch.float32)
        flops = paper["flops"] * found["tokens"]
        entries = [
            ("plan: CPU s", found["planned seconds"], found["seconds"]),
            ("plan: peak GB", found["planned memory"] / 1e9, found["memory"] / 1e9),
            ("plan: disk GB", found["planned disk"] / 1e9, found["disk"] / 1e9),
            ("paper: peak GB", (found[IMPORTED] + paper["memory"]) / 1e9, found["memory"] / 1e9),
        ]
        if speed:
            entries.append(("paper: CPU s", flops / speed, found["seconds"]))
        speed = speed or flops / found["seconds"]
        for name, planned, measured in entries:
            ratio = planned / measured
            table.append({"run": what, "what": name, "predicted": planned, "measured": measured, "ratio": ratio})
            table[-1]["target"] = "1/1.3 to 1.3"
    return table


def tabulate(tflops: float) -> list[dict[str, object]]:
    """Large models and pools, one GPU, bf16 weights, LoRA of rank 16 on every linear."""
    shapes = {
        "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
        "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
        "70B": {
            **{"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
            "num_key_value_heads": 8,
        },
    }
    table: list[dict[str, object]] = []
    for name, shape in shapes.items():
        config = LlamaConfig(vocab_size=32_000, tie_word_embeddings=False, **shape)
        paper = count_on_paper(config, 16, BUDGET // LENGTH, LENGTH, 0.5, torch.bfloat16)
        for num_rows in (10**4, 10**5, 10**6, 10**7):
            hours = 2 * paper["flops"] * num_rows * LENGTH / (tflops * 1e12) / 3600
            state = paper["adapter"] * (8 + 8 + 4) + num_rows * 8
            table.append(
                {
                    "model": name,
                    "rows": f"{num_rows:,}",
                    "tokens per pass": f"{num_rows * LENGTH:,}",
                    "GFLOP per token": paper["flops"] / 1e9,
                    "of 4 x parameters": paper["flops"] / 4 / paper["parameters"],
                    "GPU hours, fit + score": hours,
                    "weights GB": paper["weights"] / 1e9,
                    "peak GB": paper["memory"] / 1e9,
                    "state on disk GB": state / 1e9,
                    "store (float32) TB": paper["adapter"] * 4 * num_rows / 1e12,
                    "reduced GB per process": (paper["adapter"] * 16 + num_rows * 8) / 1e9,
                }
            )
    return table


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not how well it plans.")
    parser.add_argument("--tflops", type=float, default=300.0, help="Assumed TFLOP/s of the GPU in the paper's table.")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = set_up(parser)
    if args.measure is not None:
        print(json.dumps(measure(*args.measure)))
        return
    num_rows, models = (60, [(64, 2), (64, 4)]) if args.quick else (500, [(256, 4), (256, 8), (384, 6)])
    report("plan", compare(num_rows, models), args.output_dir)
    print(f"\nOn paper: rows of {LENGTH} tokens, half of them with loss, {BUDGET} tokens per batch, bf16, LoRA r=16,")
    print(f"{args.tflops:g} TFLOP/s assumed.")
    report("plan_on_paper", tabulate(args.tflops), args.output_dir)


if __name__ == "__main__":
    main()

"""What a pass asks of a device: calls per batch and memory kept per token, counted without one.

python benchmarks/calls.py [--quick] [--output_dir benchmarks/results]

Calls: operations that a GPU would run as kernels (views left out) in one batch of a tiny Qwen3 of 28 layers with LoRA
on every linear; below some 1 billion parameters a GPU waits for them to be issued. Memory: what the forward keeps for
the backward, at full width for one and for two layers, so that the difference is what a layer keeps.
"""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import make_parser, report
from gpu import RANK, make_shape
from peft import LoraConfig, PeftModel, get_peft_model
from speed import run_plain
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM
from workload import compute_mean_gradients, make_passes, make_rows

from hf_in2core.engine.batches import collate, read_token_rows
from hf_in2core.engine.blocks import find_blocks
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.losses import run_to_head
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.reductions import FitDirections, compute_dots, compute_fit_terms, compute_gradient_sum


VIEWS = set(
    "view _unsafe_view t transpose expand slice select unsqueeze squeeze permute detach alias as_strided split "
    "_reshape_alias diagonal unfold lift_fresh split_with_sizes empty_like empty empty_strided".split()
)


class CallCounter(TorchDispatchMode):
    """Counts what is no view."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        if name not in VIEWS:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def make_model(shape: str, num_layers: int, tiny: bool, dtype: torch.dtype, vocab_size: int = 512) -> PeftModel:
    """A shape with fewer layers and words, on the CPU."""
    config = make_shape(shape, quick=tiny)
    config.num_hidden_layers, config.vocab_size = num_layers, vocab_size
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * num_layers
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    adapter = LoraConfig(r=RANK, target_modules="all-linear")
    return get_peft_model(model, adapter)


def count_calls(num_layers: int, dtype: torch.dtype) -> list[dict[str, object]]:
    """Calls of one batch in each pass, beside those of a plain step."""
    model = make_model("0.6B", num_layers, True, dtype)
    rows = make_rows(4, 512, 16, 16)
    passes = make_passes(model, autocast=torch.bfloat16)
    v = {name: value.float() for name, value in compute_mean_gradients(passes, rows).items()}
    fit = FitDirections(v, dict.fromkeys(v, 1e-3))
    batch = collate(read_token_rows(rows), torch.arange(4).numpy())
    sums = {name: torch.zeros(2, value.numel(), dtype=torch.float64) for name, value in v.items()}

    def fit_batch(recorder: GradientRecorder) -> None:
        found, _ = compute_fit_terms(recorder, batch, "mean", fit)
        for name, value in found.items():
            sums[name] += value

    def validate(recorder: GradientRecorder) -> None:
        for name, value in compute_gradient_sum(recorder, batch, "mean").items():
            sums[name][0].add_(value.flatten())

    works: dict[str, Callable[[GradientRecorder], object]] = {
        "score": lambda recorder: compute_dots(recorder, batch, "mean", v),
        "validation": validate,
        "fit": fit_batch,
    }
    found = {}
    with CallCounter() as counter:
        run_plain(model, rows, 4096, autocast=torch.bfloat16)
    found["plain step"] = counter.counts
    with GradientRecorder(model, passes.blocks, torch.bfloat16) as recorder:
        for name, work in works.items():
            work(recorder)  # the first run looks at the head
            with CallCounter() as counter:
                work(recorder)
            found[name] = counter.counts
    plain = sum(found["plain step"].values())
    return [
        {
            "base": str(dtype).removeprefix("torch."),
            "one batch of": name,
            "calls": sum(counts.values()),
            "of a plain step": sum(counts.values()) / plain,
            "target": {"score": "<= 1.15", "fit": "<= 1.45"}.get(name, ""),
            "most of them": ", ".join(f"{key} {count}" for key, count in counts.most_common(5)),
        }
        for name, counts in found.items()
    ]


def measure_kept(passes: Passes, length: int) -> int:
    """Bytes that the forward of two rows keeps for the backward, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in passes.model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    rows = make_rows(2, 512, length, length, prompt=0.9)
    batch = collate(read_token_rows(rows), torch.arange(2).numpy())
    with (
        GradientRecorder(passes.model, passes.blocks, passes.autocast),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        run_to_head(passes.model, batch, passes.autocast)
    return sum(storage.nbytes() for storage in kept.values())


def count_memory(shape: str, quick: bool, dtype: torch.dtype, target: str) -> dict[str, object]:
    """MiB per token that a whole model of that shape keeps."""
    slopes = []
    for num_layers in (1, 2):
        model = make_model(shape, num_layers, quick, dtype)
        passes = Passes(model, find_blocks(model, "default"), "mean", 4096, autocast=torch.bfloat16)
        slopes.append((measure_kept(passes, 128) - measure_kept(passes, 64)) / 128)
        del model, passes
    layers = make_shape(shape, quick).num_hidden_layers
    per_token = (slopes[1] - slopes[0]) * layers + 2 * slopes[0] - slopes[1]
    what = f"{shape}, {str(dtype).removeprefix('torch.')} base"
    return {"model": what, "MiB kept per token": per_token / 2**20, "target": target}


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs.")
    parser.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    num_layers = 6 if args.quick else 28
    report(
        "calls",
        [row for dtype in (torch.float32, torch.bfloat16) for row in count_calls(num_layers, dtype)],
        args.output_dir,
    )
    targets = {"0.6B": "<= 1.8", "7B": "<= 5.3"}
    dtypes = {torch.bfloat16: True, torch.float32: False}
    table = [
        count_memory(shape, args.quick, dtype, target if counts else "")
        for shape, target in targets.items()
        for dtype, counts in dtypes.items()
    ]
    report("kept_memory", table, args.output_dir)


if __name__ == "__main__":
    main()

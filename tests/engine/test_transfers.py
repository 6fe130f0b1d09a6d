"""How often the host waits for a device in a batch: a GPU that is waited for stands still meanwhile."""

import sys
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import make_tokens, make_trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_in2core.engine.batches import collate, read_token_rows
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.reductions import FitDirections, compute_dots, compute_fit_terms, compute_gradient_sum


class Scalars(TorchDispatchMode):
    """Counts values that the host reads (`.item()`, `bool()`, `float()`), by who reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.by_library: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            frame = sys._getframe(1)
            while frame.f_globals["__name__"].partition(".")[0] in ("torch", __name__):
                frame = frame.f_back  # type: ignore[assignment]
            self.by_library[frame.f_globals["__name__"].partition(".")[0]] += 1
        return function(*args, **(kwargs or {}))


class Copies(TorchFunctionMode):
    """Counts results that are brought to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.Tensor.cpu and args[0].is_floating_point()
        return function(*args, **(kwargs or {}))


# With padding, Transformers' choice of a mask reads two values; without it one, with a mask or without.
@pytest.mark.parametrize(("rows", "read_by_transformers"), [([0, 1, 2], 2), ([0, 0], 1)])
@pytest.mark.parametrize("work", ["score", "fit", "validation"])
def test_a_batch_waits_once(tmp_path, validation, work, rows, read_by_transformers) -> None:
    trainer = make_trainer(tmp_path, make_tokens(6, seed=2), validation, torch.float32)
    passes = trainer.make_passes(trainer.blocks, "")
    batch = collate(read_token_rows(trainer.prepared_pool), torch.tensor(rows).numpy())
    v = {name: torch.full((1, *block.tensor.shape), 1e-3) for name, block in passes.blocks.items()}
    fit = FitDirections(v, dict.fromkeys(v, 1e-3))
    works: dict[str, Any] = {
        "score": lambda recorder: compute_dots(recorder, batch, "mean", v),
        "fit": lambda recorder: compute_fit_terms(recorder, batch, "mean", fit),
        "validation": lambda recorder: compute_gradient_sum(recorder, batch, "mean"),
    }
    with GradientRecorder(passes.model, passes.blocks) as recorder:
        works[work](recorder)  # the first run looks at the head
        with Scalars() as scalars, Copies() as copies:
            works[work](recorder)
    assert copies.count == 1
    assert scalars.by_library == {"transformers": read_by_transformers}

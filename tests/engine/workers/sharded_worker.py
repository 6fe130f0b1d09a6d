"""Launched by test_sharded.py: fit and score with the frozen base weights sharded by `fully_shard`."""

import json
import sys
from pathlib import Path
from typing import Any


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_trainer  # noqa: E402
from peft import PeftModel  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402
from torch.distributed.fsdp import fully_shard  # noqa: E402
from torch.distributed.tensor import DTensor  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaDecoderLayer  # noqa: E402

from hf_in2core import InfluenceTrainer  # noqa: E402
from hf_in2core.engine.batches import TokenBatch, read_token_rows  # noqa: E402
from hf_in2core.engine.passes import run_batches  # noqa: E402


def shard(model: PeftModel, world_size: int) -> PeftModel:
    mesh = init_device_mesh("cpu", (world_size,))
    adapter = {p for p in model.parameters() if p.requires_grad}
    for module in model.modules():
        if isinstance(module, LlamaDecoderLayer):
            fully_shard(module, mesh=mesh, ignored_params=adapter)
    fully_shard(model, mesh=mesh, ignored_params=adapter)
    return model


def run(folder: str, options: dict[str, Any], world_size: int = 1) -> tuple[InfluenceTrainer, dict[str, Any]]:
    """One run of fit and score; called by the test too, for the same without sharding."""
    options = dict(options)
    num_rows, per_example = options.pop("num_rows"), options.pop("per_example", False)
    pool, validation = make_prompt_completion(num_rows, seed=0), make_prompt_completion(5, seed=1)
    model = add_trained_adapter(make_model(), modules_to_save=options.pop("modules_to_save", None)).double()
    if world_size > 1:
        model = shard(model, world_size)
    trainer = make_trainer(folder, pool, validation, model=model, **options)
    scorer = trainer.fit_influence(per_example=per_example)
    influence = list(trainer.score_influence()["influence"])
    return trainer, {"influence": influence, "base_hash": scorer.config.base_model_hash}


def catch(error_type: type[Exception], function: Any, *args: Any, **kwargs: Any) -> str:
    try:
        function(*args, **kwargs)
    except error_type as error:
        return str(error)
    return ""


def main() -> None:
    options = json.loads(sys.argv[1])
    state = PartialState(cpu=True)
    if state.num_processes != options["world_size"]:
        raise SystemExit(f"{state.num_processes} processes where {options['world_size']} were expected")
    results = []
    for index, one in enumerate(options["runs"]):
        trainer, result = run(f"{options['output_dir']}-{index}", one, state.num_processes)
        results.append(result)

    def run_out_of_memory(batch: TokenBatch) -> None:
        torch.empty(2**60)

    passes, rows = trainer.make_passes(trainer.blocks, ""), read_token_rows(trainer.prepared_pool, 0, 2)
    parameters = list(trainer.model.parameters())
    pool = make_prompt_completion(4, seed=0)
    found = {
        "results": results,
        "elements": sum(p.numel() for p in parameters),
        "local_elements": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters),
        "trained_head": catch(
            ValueError,
            run,
            f"{options['output_dir']}-head",
            {"num_rows": 4, "modules_to_save": ["lm_head"]},
            state.num_processes,
        ),
        "map": catch(ValueError, pool.map, trainer.fit_influence(), batched=True),
        "out_of_memory": catch(RuntimeError, run_batches, passes, rows, run_out_of_memory),
    }
    Path(options["out"]).with_suffix(f".{state.process_index}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

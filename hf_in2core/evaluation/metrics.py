"""Token-weighted perplexity and accuracy as `evaluate.Metric` subclasses; nothing is downloaded.

A module of its own because importing evaluate imports torch and transformers (seconds), which the verdict does not
need.
"""

import math
from typing import Any

import numpy as np
from datasets import Features, Value
from evaluate import Metric, MetricInfo


class _TokenMetric(Metric):
    r"""
    A metric over labelled tokens from sums per row.

    Rows stay in memory: evaluate's default is a cache file under a lock, for which processes on one machine compete.
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **kwargs: Any) -> None:
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **kwargs)

    def compute(self, **kwargs: Any) -> dict[str, float] | None:
        """Compute the metric over the rows given here and those added before."""
        names = self._feature_names()
        given = [name for name in names if kwargs.get(name) is not None]
        if given != names and (given or (self.writer is None and self.process_id == 0)):
            raise ValueError(
                f"{type(self).__name__} was given {' and '.join(given) or 'no rows'}. "
                f"Pass {' and '.join(names)}, here or to `add_batch` before."
            )
        return super().compute(**kwargs)


class TokenPerplexity(_TokenMetric):
    r"""
    Perplexity over labelled tokens: every token weighs the same, whatever row it is in.

    ```python
    >>> from hf_in2core.evaluation.metrics import TokenPerplexity

    >>> perplexity = TokenPerplexity()
    >>> perplexity.add_batch(nll_sum=[6.0, 2.0], num_loss_tokens=[3, 1])
    >>> perplexity.compute()
    {'perplexity': 7.38905609893065, 'loss': 2.0}
    ```

    Inputs of `add_batch` and `compute`, per row: `nll_sum` (`float`), the negative log-likelihood in nats summed over
    the labelled tokens, and `num_loss_tokens` (`int`), their number. `compute` returns `loss`, the mean negative
    log-likelihood per labelled token in nats, and `perplexity`, its exponential; summed in float64.
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Perplexity over labelled tokens, each token with the same weight.",
            citation="",
            inputs_description="\n\nArgs:\n"
            "    nll_sum (`list[float]`): negative log-likelihood per row in nats, summed over its labelled tokens.\n"
            "    num_loss_tokens (`list[int]`): number of labelled tokens per row.\n",
            features=Features({"nll_sum": Value("float64"), "num_loss_tokens": Value("int64")}),
        )

    def _compute(self, *, nll_sum: list[float], num_loss_tokens: list[int]) -> dict[str, float]:
        loss = math.fsum(nll_sum) / _count_tokens(num_loss_tokens)
        # numpy's exp, because math.exp raises where a diverged model should read as infinite perplexity.
        with np.errstate(over="ignore"):
            return {"perplexity": float(np.exp(loss)), "loss": loss}


class TokenAccuracy(_TokenMetric):
    r"""
    Share of labelled tokens that are predicted right: every token weighs the same, whatever row it is in.

    ```python
    >>> from hf_in2core.evaluation.metrics import TokenAccuracy

    >>> accuracy = TokenAccuracy()
    >>> accuracy.compute(num_correct=[2, 1], num_loss_tokens=[3, 1])
    {'accuracy': 0.75}
    ```

    Inputs of `add_batch` and `compute`, per row: `num_correct` (`int`), the labelled tokens to which the model gives
    the highest probability, and `num_loss_tokens` (`int`), the labelled tokens. From token ids with -100 masks these
    are `((predictions == labels) & (labels != -100)).sum(-1)` and `(labels != -100).sum(-1)`, with the predictions
    shifted to the labels. `compute` returns `accuracy` in [0, 1].
    """

    def _info(self) -> MetricInfo:
        return MetricInfo(
            description="Share of labelled tokens that are predicted right, each token with the same weight.",
            citation="",
            inputs_description="\n\nArgs:\n"
            "    num_correct (`list[int]`): number of labelled tokens predicted right per row.\n"
            "    num_loss_tokens (`list[int]`): number of labelled tokens per row.\n",
            features=Features({"num_correct": Value("int64"), "num_loss_tokens": Value("int64")}),
        )

    def _compute(self, *, num_correct: list[int], num_loss_tokens: list[int]) -> dict[str, float]:
        num_tokens = _count_tokens(num_loss_tokens)
        for row, (correct, tokens) in enumerate(zip(num_correct, num_loss_tokens, strict=True)):
            if not 0 <= correct <= tokens:
                raise ValueError(
                    f"Row {row} has num_correct={correct}, but num_loss_tokens={tokens}: count both again."
                )
        return {"accuracy": sum(num_correct) / num_tokens}


def _count_tokens(num_loss_tokens: list[int]) -> int:
    if any(tokens < 0 for tokens in num_loss_tokens):
        raise ValueError(
            f"num_loss_tokens has a negative count ({min(num_loss_tokens)}). It is the number of labelled tokens per "
            "row, not the labels."
        )
    num_tokens = sum(num_loss_tokens)
    if num_tokens == 0:
        raise ValueError(
            f"None of the {len(num_loss_tokens)} rows has a labelled token, so there is nothing to average. Check the "
            "masks and max_length with which the rows were prepared."
        )
    return num_tokens

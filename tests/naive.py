"""Independent oracle: DataInf by batch-size-1 automatic differentiation, gradients in memory, plain loops."""

import math

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional as F


def compute_loss(model, row: dict, loss_reduction: str = "mean") -> torch.Tensor:
    """Loss of one row in the model's own precision (`labels=` would go through float32)."""
    labels = torch.tensor(row["labels"], device=model.device)[1:]
    logits = model(input_ids=torch.tensor([row["input_ids"]], device=model.device)).logits[0, :-1]
    losses = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")[labels != -100]
    if loss_reduction == "max":
        values = losses.tolist()
        return losses[values.index(max(values))]
    return losses.sum() / {"sum": 1, "sqrt": len(losses) ** 0.5, "mean": len(losses)}[loss_reduction]


def compute_gradients(model, rows: Dataset, loss_reduction: str = "mean") -> list[dict[str, torch.Tensor]]:
    """Gradient of the loss of every row for every trainable tensor, one row and one backward at a time."""
    model.eval()
    gradients = []
    for row in rows:
        model.zero_grad()
        compute_loss(model, row, loss_reduction).backward()
        gradients.append(
            {
                n: p.grad.clone().flatten()
                for n, p in model.named_parameters()
                if p.grad is not None and p.requires_grad
            }
        )
    model.zero_grad()
    return gradients


def compute_datainf(
    train: list[dict[str, torch.Tensor]], validation: list[dict[str, torch.Tensor]], damping_scale: float = 0.1
) -> torch.Tensor:
    """
    Influence of every training row by DataInf's closed form, block by block and example by example.

    Follows the published loops: the inner fraction of `g_i` is formed with every `g_k` before summing.
    """
    n = len(train)
    influence = torch.zeros(n, dtype=torch.float64)
    for name in train[0]:
        g = [gradients[name].double() for gradients in train]
        v = torch.stack([gradients[name].double() for gradients in validation]).mean(0)
        damping = damping_scale * sum(float(x @ x) for x in g) / n / v.numel()
        if damping == 0:  # no row has a gradient for it
            continue
        along, dots = [float(v @ x) for x in g], (torch.stack(g) @ torch.stack(g).T).tolist()
        for k in range(n):
            total = 0.0
            for i in range(n):
                total += along[k] - along[i] * dots[i][k] / (damping + dots[i][i])
            influence[k] -= total / n / damping
    return influence


def compute_whole_dots(train: list[dict], validation: list[dict], estimator: str) -> torch.Tensor:
    """Influence by `"gradient_dot"` or `"gradient_cosine"` of whole gradients, all tensors as one vector, `[n]`."""
    g, v = (torch.stack([torch.cat(list(row.values())) for row in rows]) for rows in (train, validation))
    v = v.mean(0)
    return -g @ v if estimator == "gradient_dot" else -torch.cosine_similarity(g, v[None])


def draw_gradients(n: int, d: int, q: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random gradients of rows, `[n, d]`, and of queries, `[q, d]`, in float64."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, d, generator=generator, dtype=torch.float64),
        torch.randn(q, d, generator=generator, dtype=torch.float64),
    )


def compute_dense_ihvp(g: torch.Tensor, v: torch.Tensor, damping: float) -> torch.Tensor:
    """`mean_i (damping I + g_i g_i^T)^-1 v` by dense linear algebra; `g` is `[n, d]`, `v` is `[d]`."""
    identity = torch.eye(g.shape[1], dtype=g.dtype)
    return torch.stack([torch.linalg.solve(damping * identity + torch.outer(x, x), v) for x in g]).mean(0)


def embed(model: PeftModel, ids: list[int]) -> torch.Tensor:
    """RDS+ embedding of one row: no batch, no padding, and the hidden states that the model itself returns."""
    model.eval()
    with torch.no_grad():
        hidden = (
            model(input_ids=torch.tensor([ids], device=model.device), output_hidden_states=True)
            .hidden_states[-1][0]
            .double()
            .cpu()
        )
    total = sum(range(1, len(ids) + 1))
    return torch.stack([(t + 1) / total * hidden[t] for t in range(len(ids))]).sum(0)


def score_bm25(query: list[str], corpus: list[list[str]]) -> list[float]:
    """BM25 in Lucene's variant, k1 = 1.5 and b = 0.75; each occurrence of a word in the query counts."""
    average = sum(map(len, corpus)) / len(corpus)
    scores = []
    for document in corpus:
        score = 0.0
        for word in query:
            containing = sum(word in other for other in corpus)
            if containing:
                idf = math.log(1 + (len(corpus) - containing + 0.5) / (containing + 0.5))
                count = document.count(word)
                score += idf * count / (count + 1.5 * (1 - 0.75 + 0.75 * len(document) / average))
        scores.append(score)
    return scores

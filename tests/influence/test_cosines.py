"""Columns of cosines against loops: in turn, and LESS with an optimizer that takes each step; and their refusals."""

import copy
import json

import numpy as np
import pytest
import torch
from helpers import (
    assert_same,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
    prepare,
    train_reference,
)
from naive import compute_datainf, compute_gradients
from peft import PeftModel

from hf_in2core import select_coreset
from hf_in2core.influence.cosines import add_cosine, add_less, compute_less
from hf_in2core.rows.preparation import Preparation, prepare_rows


def train(folder, adapter=None, **options):
    """A reference trained for six steps, with a checkpoint after each third one; the checkpoints."""
    train_reference(folder, save_steps=3, adapter=adapter, weight_decay=0.1, **options)
    return [folder / f"checkpoint-{step}" for step in (3, 6)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


def test_cosines_in_turn_in_python(tmp_path, pool, validation) -> None:
    """The turns of a loop over the rows; the pool keeps its order, and another pool is refused."""
    trainer = make_trainer(tmp_path, pool, validation)
    train, queries = (compute_gradients(trainer.model, prepare(rows)) for rows in (pool, validation))
    norms = np.array([float(sum(g.square().sum() for g in row.values())) ** 0.5 for row in train])
    cosines = [compute_datainf(train, [query]).numpy() / norms for query in queries]
    expected: list[int] = []
    while len(expected) < len(pool):
        best = np.argsort(cosines[len(expected) % len(queries)], kind="stable")
        expected.append(next(int(row) for row in best if row not in expected))
    scored = add_cosine(pool, trainer)
    assert [scored["cosine_rank"][row] for row in expected] == list(range(len(pool)))
    assert [scored["cosine_taker"][row] for row in expected] == [n % len(queries) for n in range(len(pool))]
    # The loop leaves out the norm of `u`, which is one number for all scores of a validation row.
    for query, of_query in enumerate(cosines):
        ratios = [scored["cosine_score"][row] / of_query[row] for row in expected[query :: len(queries)]]
        assert ratios == pytest.approx([ratios[0]] * len(ratios), rel=1e-3) and ratios[0] > 0
    assert max(map(abs, scored["cosine_score"])) <= 1 + 1e-6
    chosen = select_coreset(scored, size=5, strategy="cosine")
    made = ["cosine_rank", "cosine_score", "cosine_taker"]
    assert chosen.remove_columns(made)[:] == pool.select(expected[:5])[:]
    for add, more in ((add_cosine, ()), (add_less, ([],))):
        with pytest.raises(ValueError, match=f"4 rows are to get a column, but the trainer's pool has {len(pool)}"):
            add(pool.select(range(4)), trainer, *more)


def load(folder, checkpoint, pool, sets, **options):
    model = PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True)
    return make_trainer(folder, pool, sets, model=model, estimator="gradient_dot", **options)


def step_with_adam(model, checkpoint, gradient) -> torch.Tensor:
    """How far torch's own Adam goes on one gradient from the checkpoint's state, per unit of learning rate."""
    stored = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    named = [(name, tensor) for name, tensor in model.named_parameters() if tensor.requires_grad]
    total = []
    for number, (name, tensor) in enumerate(named):
        moved = torch.zeros_like(tensor, requires_grad=True)
        moved.grad = gradient[name].view_as(tensor).clone()
        adam = torch.optim.Adam([moved], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
        state = stored["state"][number]
        adam.state[moved] = {k: v.clone() if k == "step" else v.to(tensor.dtype) for k, v in state.items()}
        adam.step()
        total.append(-moved.detach().flatten())
    return torch.cat(total)


def join(model, gradient) -> torch.Tensor:
    return torch.cat([gradient[name] for name, tensor in model.named_parameters() if tensor.requires_grad])


def test_less_is_that_of_a_loop(tmp_path, checkpoints, pool, validation) -> None:
    sets = {"a": validation, "b": make_prompt_completion(3, seed=9)}
    trainer = load(tmp_path / "all", checkpoints[1], pool, sets, chunk_size=7)
    before = copy.deepcopy(trainer.model.state_dict())
    found = compute_less(trainer, checkpoints[::-1])
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.model.state_dict().items())

    history = json.loads((checkpoints[1] / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    weights = np.array([np.mean(rates[:3]), np.mean(rates[3:])])
    preparation = Preparation(make_tokenizer(), completion_only_loss=True)
    cosines: dict[str, list[np.ndarray]] = {name: [] for name in sets}
    for checkpoint in checkpoints:
        model = PeftModel.from_pretrained(make_model(), checkpoint, is_trainable=True).double()
        rows = compute_gradients(model, prepare_rows(pool, preparation))
        updates = torch.stack([step_with_adam(model, checkpoint, row) for row in rows])
        for name, part in sets.items():
            queries = torch.stack([join(model, g) for g in compute_gradients(model, prepare_rows(part, preparation))])
            cosines[name].append(torch.cosine_similarity(updates[:, None], queries[None], dim=2).numpy())
    expected = -np.max(
        [np.tensordot(weights / weights.sum(), np.array(found), 1).mean(axis=1) for found in cosines.values()], axis=0
    )
    assert_same(found, expected, 1e-6)


def test_what_is_no_state_of_adam_is_refused(tmp_path, checkpoints, pool, validation) -> None:
    trainer = load(tmp_path / "all", checkpoints[1], pool, validation)
    with pytest.raises(ValueError, match=r"none are given.*--reference_checkpoints 4"):
        compute_less(trainer, [])
    trainer.model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter holds no optimizer\.pt"):
        compute_less(trainer, [checkpoints[0], tmp_path / "adapter"])
    sgd = train(tmp_path / "sgd", optim="sgd")
    with pytest.raises(ValueError, match=r"no moments of Adam \(exp_avg, exp_avg_sq\).*`adamw_torch`"):
        compute_less(load(tmp_path / "other", sgd[0], pool, validation), sgd)
    embedding = train(tmp_path / "embedding", adapter={"modules_to_save": ["embed_tokens"]})
    with pytest.raises(ValueError, match=r"`.*embed_tokens.*` is a matrix with a row for every token"):
        compute_less(load(tmp_path / "third", embedding[0], pool, validation), embedding)
    with pytest.raises(ValueError, match="estimator='datainf'"):
        model = PeftModel.from_pretrained(make_model(), checkpoints[0], is_trainable=True)
        compute_less(make_trainer(tmp_path / "datainf", pool, validation, model=model), checkpoints)

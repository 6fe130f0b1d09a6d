"""One row, one meaning: plain SFT, the trainer, `map` and a stream see the same tokens, labels and influence."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from helpers import CHAT_TEMPLATE, add_trained_adapter, make_model, make_tokenizer, make_trainer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import PeftModel
from trl import SFTConfig, SFTTrainer

from hf_in2core.rows.preparation import prepare_batch
from hf_in2core.rows.sources import load_rows


TOOLS_TEMPLATE = (
    "{% if tools %}<|system|>{{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{% if message.reasoning_content %}({{ message.reasoning_content }}){% endif %}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content or [] %}{{ part.text }}{% endfor %}{% endif %}"
    "{% for call in message.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]"
    "{% endfor %}</s>{% endgeneration %}"
    "{% elif message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Shows every key that a turn has, so that a key of a neighbour's cannot hide.
KEYS_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% for key in message | list | sort %}{{ key }},{% endfor %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

WORDS = st.sampled_from(["the", "cat", "01234", "2024-05-01", "null", "ß", "早", "a b", "'\"", "<|user|>", "1e5", ""])
TEXTS = st.lists(WORDS, min_size=1, max_size=4).map(" ".join).map(lambda text: text + " .")
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abcd"), inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(st.sampled_from(["city", "a", "b", "n"]), st.integers(0, 9) | TEXTS, max_size=2)
CALLS = st.lists(
    st.builds(
        lambda name, given: {"type": "function", "function": {"name": name, "arguments": given}}, TEXTS, ARGUMENTS
    ),
    min_size=1,
    max_size=2,
)
TOOLS = st.none() | st.lists(
    st.builds(
        lambda name, keys: {"type": "function", "function": {"name": name, "parameters": keys}},
        st.sampled_from(["look", "go"]),
        st.dictionaries(st.sampled_from("xyz"), st.sampled_from(["int", "str"]), max_size=2),
    ),
    max_size=2,
)


def list_turns(draw: Any, rich: bool) -> list[dict[str, Any]]:
    """A conversation that ends with the assistant."""
    turns: list[dict[str, Any]] = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 2))):
        turns += [{"role": "user", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
        if not rich:
            continue
        kind = draw(st.sampled_from(["text", "parts", "calls", "reasoning", "name"]))
        if kind == "parts":
            turns[-2]["content"] = [
                {"type": "text", "text": text} for text in draw(st.lists(TEXTS, min_size=1, max_size=2))
            ]
        elif kind == "calls":
            turns[-1] |= {"content": None, "tool_calls": draw(CALLS)}
            turns += [{"role": "tool", "content": draw(TEXTS)}, {"role": "assistant", "content": draw(TEXTS)}]
        elif kind == "reasoning":
            turns[-1]["reasoning_content"] = draw(TEXTS)
        elif kind == "name":
            turns[-2]["name"] = draw(TEXTS)
    return turns


@st.composite
def make_sets(draw: Any) -> tuple[list[dict[str, Any]], dict[str, Any], str | None]:
    """Rows of one format with unused columns of any kind, settings of SFT, and a chat template."""
    kind = draw(st.sampled_from(["messages", "tools", "keys", "conversational", "from", "plain", "text"]))
    rich = kind == "tools"
    rows = []
    for number in range(draw(st.integers(8, 24))):
        if kind == "plain":
            row: dict[str, Any] = {"prompt": draw(TEXTS), "completion": draw(TEXTS)}
        elif kind == "text":
            row = {"text": draw(TEXTS)}
        else:
            turns = list_turns(draw, rich)
            if kind == "keys" and draw(st.booleans()):
                turns[0]["weight"] = draw(st.sampled_from([None, 1]))
            row = {"messages": turns}
            if rich:
                row["tools"] = draw(TOOLS)
            if kind == "conversational":
                row = {"prompt": turns[:-1], "completion": turns[-1:]}
            if kind == "from":
                row = {"conversations": [{"from": turn["role"], "value": turn["content"]} for turn in turns]}
        rows.append(row | {"number": number, "note": draw(VALUES) if draw(st.booleans()) else None})
    options: dict[str, Any] = {"max_length": draw(st.sampled_from([None, 24, 512]))}
    options["truncation_mode"] = draw(st.sampled_from(["keep_start", "keep_end"]))
    conversations = kind not in ("plain", "text")
    # Plain SFT looks for a mask before it has renamed `from` and `value`, and refuses.
    if conversations and kind != "from" and draw(st.booleans()):
        options["assistant_only_loss"] = True
    template = {"tools": TOOLS_TEMPLATE, "keys": KEYS_TEMPLATE}.get(kind, CHAT_TEMPLATE)
    return rows, options, template if conversations else None


def store(rows: list[dict[str, Any]], as_file: bool, folder: Path) -> Dataset:
    """Rows as a user has them: read from JSON lines, or made in Python (columns of mixed type are JSON there too)."""
    if as_file:
        path = folder / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return load_rows(str(path))
    return Dataset.from_list(rows, on_mixed_types="use_json")


def list_tokens(prepared: Any) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the rows with a token that carries loss (the first is never predicted)."""
    rows = prepared.with_format(None)
    return [(row["input_ids"], row["labels"]) for row in rows if any(label != -100 for label in row["labels"][1:])]


def make_small() -> PeftModel:
    """What differs is a row's tokens, which any adapter shows."""
    return add_trained_adapter(make_model(num_layers=1, hidden_size=16), target_modules=["q_proj"])


def count_same(
    rows: list[dict[str, Any]], options: dict[str, Any], template: str | None, as_file: bool, batch: int
) -> int:
    """Compare one set of rows on every way through the product; returns how many rows were the same."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pool = store(rows, as_file, folder)
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template
        plain = SFTTrainer(
            model=make_small(),
            args=SFTConfig(str(folder / "sft"), bf16=False, use_cpu=True, report_to="none", **options),
            # TRL cannot leave a mixed column alone: it is none of the format's.
            train_dataset=pool.remove_columns(["note"]),
            processing_class=tokenizer,
        ).train_dataset
        trainer = make_trainer(
            folder / "influence",
            pool,
            pool.select(range(3)),
            dtype=None,
            model=make_small(),
            tokenizer=tokenizer,
            **options,
        )
        wanted = list_tokens(plain)
        assert list_tokens(trainer.prepared_pool) == wanted
        preparation = trainer.preparation
        apart, order = [], np.random.default_rng(len(rows)).permutation(len(rows))
        for start in range(0, len(rows), batch):
            chosen = [int(position) for position in order[start : start + batch]]
            prepared, _ = prepare_batch(pool.select(chosen)[:], preparation)
            apart += [(chosen[row["row"]], row["input_ids"], row["labels"]) for row in prepared]
        assert [(ids, labels) for _, ids, labels in sorted(apart) if any(x != -100 for x in labels[1:])] == wanted

        scored, scorer = trainer.score_influence(), trainer.fit_influence()
        influence = np.array(scored.with_format(None)["influence"][:], dtype=float)
        mapped = pool.map(scorer, batched=True, batch_size=batch)
        streamed = list(pool.to_iterable_dataset().map(scorer, batched=True, batch_size=batch + 1))
        for other in (mapped["influence"][:], [row["influence"] for row in streamed]):
            np.testing.assert_allclose(
                np.array(other, dtype=float), influence, rtol=1e-4, atol=1e-4 * np.nanmax(np.abs(influence))
            )
        assert mapped["num_loss_tokens"][:] == scored["num_loss_tokens"][:]
    return len(rows)


def compare(sets: Any, as_file: bool, batch: int) -> int:
    try:
        return count_same(*sets, as_file, batch)  # type: ignore
    except ValueError as error:  # a set of rows that `max_length` leaves nothing of
        assert "carries a loss token" in str(error)
        return 0


SETTINGS: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=6, **SETTINGS)
@given(make_sets(), st.booleans(), st.integers(1, 7))
def test_a_row_is_the_same_on_every_way(sets: Any, as_file: bool, batch: int) -> None:
    compare(sets, as_file, batch)


@pytest.mark.slow
def test_thousands_of_rows_are_the_same_on_every_way(capsys: pytest.CaptureFixture[str]) -> None:
    counts: list[int] = []

    @settings(max_examples=120, **SETTINGS)
    @given(make_sets(), st.booleans(), st.integers(1, 7))
    def count(sets: Any, as_file: bool, batch: int) -> None:
        counts.append(compare(sets, as_file, batch))

    count()
    with capsys.disabled():
        print(f"\n{sum(counts):,} rows in {len(counts)} sets, no difference")
    assert sum(counts) > 1500

"""Bad input: a clear error, before any long work, that says what to do."""

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from helpers import (
    CHAT_TEMPLATE,
    add_trained_adapter,
    make_config,
    make_model,
    make_prompt_completion,
    make_tokenizer,
    make_trainer,
)
from peft import LoraConfig


USER, ASSISTANT = {"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat"}


def conversational_tokenizer(template: str = CHAT_TEMPLATE):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_empty_or_missing_data(tmp_path, pool, validation) -> None:
    with pytest.raises(ValueError, match="The pool is empty"):
        make_trainer(tmp_path, pool.select([]), validation)
    with pytest.raises(ValueError, match="The validation set is empty"):
        make_trainer(tmp_path, pool, validation.select([]))
    with pytest.raises(ValueError, match="`eval_dataset` is missing"):
        make_trainer(tmp_path, pool, None)
    with pytest.raises(ValueError, match="empty dict"):
        make_trainer(tmp_path, pool, {})
    with pytest.raises(ValueError, match="IterableDataset"):
        make_trainer(tmp_path, pool.to_iterable_dataset(), validation)
    for name in ("rank", "per_query", "per_checkpoint"):
        with pytest.raises(ValueError, match="reserved"):
            make_trainer(tmp_path, pool, {name: validation})


def test_missing_and_clashing_columns(tmp_path, pool, validation) -> None:
    with pytest.raises(ValueError, match="question, answer"):
        make_trainer(tmp_path, pool, validation, columns=["prompt=question", "completion=answer"])
    with pytest.raises(ValueError, match="instruction"):
        make_trainer(tmp_path, pool, validation, columns=["alpaca"])
    with pytest.raises(ValueError, match="neither a preset"):
        make_trainer(tmp_path, pool, validation, columns=["vicuna"])
    with pytest.raises(ValueError, match="none of TRL's formats"):
        make_trainer(tmp_path, pool.remove_columns("completion"), validation)
    with pytest.raises(ValueError, match="prompt branch"):
        make_trainer(tmp_path, pool.rename_column("completion", "text"), validation)
    scored = pool.add_column("influence", [0.0] * len(pool))
    with pytest.raises(ValueError, match="overwrite=True"):
        make_trainer(tmp_path, scored, validation).score_influence()
    overwritten = make_trainer(tmp_path, scored, validation).score_influence(overwrite=True)
    assert any(value != 0.0 for value in overwritten["influence"])


def test_conversations_without_a_template(tmp_path) -> None:
    rows = Dataset.from_list([{"messages": [USER, ASSISTANT]}] * 3)
    with pytest.raises(ValueError, match="no chat template"):
        make_trainer(tmp_path, rows, rows)


def test_masks_that_do_nothing_or_hide_everything(tmp_path) -> None:
    messages, text = (Dataset.from_list([row] * 3) for row in ({"messages": [USER, ASSISTANT]}, {"text": "the cat"}))
    tokenizer = conversational_tokenizer()
    for rows in (messages, text):
        with pytest.raises(ValueError, match="completion_only_loss=True. does nothing"):
            make_trainer(tmp_path, rows, rows, tokenizer=tokenizer, completion_only_loss=True)
    with pytest.raises(ValueError, match="needs conversations"):
        make_trainer(tmp_path, text, text, tokenizer=tokenizer, assistant_only_loss=True)
    no_assistant = Dataset.from_list([{"messages": [USER, USER]}] * 3)
    with pytest.raises((ValueError, RuntimeError), match="assistant"):
        make_trainer(tmp_path, no_assistant, no_assistant, tokenizer=tokenizer, assistant_only_loss=True)


def test_rows_longer_than_max_length(tmp_path, pool, validation, caplog) -> None:
    with pytest.raises(ValueError, match="No row of the pool"):
        make_trainer(tmp_path, pool, validation, max_length=2)
    make_trainer(tmp_path, pool, validation, max_length=10)
    assert "carry no loss token" in caplog.text
    assert "were cut" in caplog.text


def test_rows_longer_than_the_model_was_made_for(tmp_path, pool, validation, caplog) -> None:
    longest = max(len(row["input_ids"]) for row in make_trainer(tmp_path, pool, validation).prepared_pool)
    model = add_trained_adapter(make_model())
    model.config.max_position_embeddings = longest
    make_trainer(tmp_path, pool, validation, model=model)
    assert "the model was made for" not in caplog.text
    model = add_trained_adapter(make_model())
    model.config.max_position_embeddings = longest - 1
    make_trainer(tmp_path, pool, validation, model=model)
    told = f"Rows of the pool have up to {longest} tokens, and the model was made for {longest - 1}"
    assert told in caplog.text


def test_validation_rows_in_the_pool_are_counted(tmp_path, pool, validation, caplog) -> None:
    make_trainer(tmp_path, pool, {"math": validation, "code": make_prompt_completion(3, seed=8)})
    assert "are in the" not in caplog.text
    shouted = pool.select([4, 2]).map(lambda row: {"prompt": row["prompt"].upper(), "id": "other"})
    make_trainer(tmp_path, pool, {"math": validation, "code": concatenate_datasets([validation, shouted])})
    found = [record.getMessage() for record in caplog.records if "are in the" in record.getMessage()]
    assert [message.partition(":")[0] for message in found] == [
        "2 of 23 rows of the pool are in the validation code set too (row 2 of the pool is row 8 of the validation "
        "code set)"
    ]


def test_no_adapter_and_an_untrained_one(tmp_path, pool, validation, caplog) -> None:
    trainer = make_trainer(
        tmp_path,
        pool,
        validation,
        dtype=None,
        model=make_model(),
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
    )
    scored = trainer.score_influence()
    assert "adapter is untrained" in caplog.text
    assert any(scored["influence"])  # through lora_B


def test_non_finite_losses_name_the_row(tmp_path, validation) -> None:
    rows = make_prompt_completion(8, seed=3).map(
        lambda row, index: {"completion": " zzz" if index == 5 else row["completion"]}, with_indices=True
    )
    trainer = make_trainer(tmp_path, rows, validation)
    token = make_tokenizer()("z")["input_ids"][0]
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight[token] = float("nan")
        trainer.model.get_output_embeddings().weight = torch.nn.Parameter(
            torch.nan_to_num(trainer.model.get_output_embeddings().weight.detach()), requires_grad=False
        )
    with pytest.raises(ValueError, match=r"row\(s\) \[5\] is not finite"):
        trainer.score_influence()


def test_settings_out_of_range(tmp_path) -> None:
    for name, value in (
        ("damping_scale", 0.0),
        ("estimator", "lissa"),
        ("loss_reduction", "median"),
        ("tokens_per_batch", 0),
        ("chunk_size", 0),
        ("fit_examples", 0),
        ("gradient_store_gb", -1.0),
        ("influence_layers", "middle:3"),
    ):
        with pytest.raises(ValueError, match=name):
            make_config(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="HF_TOKEN"):
        make_config(tmp_path, hub_token="secret")


def test_layers_that_do_not_exist(tmp_path, pool, validation) -> None:
    with pytest.raises(ValueError, match=r"layers \[7\]"):
        make_trainer(tmp_path, pool, validation, influence_layers=[1, 7])


def test_constant_zero_gradients(tmp_path, pool, validation) -> None:
    model = add_trained_adapter(make_model())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.zero_()
    with pytest.raises(ValueError, match="per-example gradient is zero"):
        make_trainer(tmp_path, pool, validation, model=model).fit_influence()

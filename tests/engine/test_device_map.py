"""Models that accelerate has spread over devices: its hooks replace the forwards that a pass replaces too."""

import copy
from typing import Any

import pytest
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from helpers import (
    ON_GPU,
    add_trained_adapter,
    assert_same,
    make_model,
    make_tokenizer,
    make_tokens,
    make_trainer,
)
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_in2core import InfluenceScorer


PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb"]
MODEL_PARTS = [*PARTS, "lm_head"]


def dispatch(model, prefix: str = ""):
    """Every module with a hook of accelerate's, as on several devices; there is one here, so hooks are forced."""
    return dispatch_model(model, {prefix + part: 0 if ON_GPU else "cpu" for part in MODEL_PARTS}, force_hooks=True)


@pytest.mark.parametrize("options", [{}, {"influence_activation_checkpointing": True}])
@pytest.mark.parametrize("adapter_comes", ["before", "after"])
def test_hooks_stay_and_change_nothing(tmp_path, monkeypatch, validation, adapter_comes, options) -> None:
    rows = make_tokens(14, seed=2)
    model = add_trained_adapter(make_model())
    plain = make_trainer(tmp_path / "a", rows, validation, model=copy.deepcopy(model)).score_influence()
    if adapter_comes == "before":
        hooked = dispatch(model.double(), "base_model.model.")
    else:
        hooked = add_trained_adapter(dispatch(make_model().double())).double()
        set_peft_model_state_dict(hooked, get_peft_model_state_dict(model))
    trainer = make_trainer(tmp_path / "b", rows, validation, dtype=None, model=hooked, loss_type="nll", **options)
    adapters = [module for name, module in hooked.named_modules() if name.endswith("lora_A.default")]
    assert all(("_hf_hook" in module.__dict__) == (adapter_comes == "before") for module in adapters)
    calls: list[nn.Module] = []
    pre_forward = AlignDevicesHook.pre_forward

    def count(hook: AlignDevicesHook, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(module)
        return pre_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", count)
    before = [(module.__dict__.get("forward"), module.__dict__.get("_old_forward")) for module in hooked.modules()]
    trainer.fit_influence()
    calls.clear()
    scored = trainer.score_influence()
    assert_same(scored["influence"], plain["influence"], 1e-9)
    after = [(module.__dict__.get("forward"), module.__dict__.get("_old_forward")) for module in hooked.modules()]
    assert after == before
    # In the score pass every hook has run, those of recorded linears and of checkpointed layers too.
    kinds = (nn.Linear, LlamaDecoderLayer)
    hooked_modules = {m for m in hooked.modules() if isinstance(m, kinds) and "_hf_hook" in m.__dict__}
    assert hooked_modules <= set(calls)


def test_offloaded_weights_are_refused_by_name(tmp_path, pool, validation, model_folder) -> None:
    trainer = make_trainer(tmp_path / "a", pool, validation, model=add_trained_adapter(make_model()).float())
    trainer.fit_influence().save_pretrained(tmp_path / "scorer")
    device_map = {part: "disk" if part == "model.layers.1" else "cpu" for part in MODEL_PARTS}

    def load() -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(model_folder, device_map=device_map, offload_folder=str(tmp_path))

    with pytest.raises(ValueError, match="offloaded to the CPU or the disk.*layers.1"):
        make_trainer(
            tmp_path / "b",
            pool,
            validation,
            dtype=None,
            model=load(),
            peft_config=LoraConfig(target_modules="all-linear"),
        )
    with pytest.raises(ValueError, match="offloaded to the CPU or the disk.*layers.1"):
        InfluenceScorer.from_pretrained(tmp_path / "scorer", model=load(), processing_class=make_tokenizer())

"""Models, tokenizers and adapters by name: found, and checked without weights before long work."""

from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import xxhash
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, get_peft_config
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from hf_in2core.engine.blocks import ATTENTION, find_blocks, select_blocks
from hf_in2core.rows.places import describe_missing, named_place
from hf_in2core.rows.template_date import pin_template, pin_tokenizer, prints_date

from .run_folder import warn


# What makes a folder a model or an adapter, and what to give.
MODEL_FOLDER = ("config.json", "Give the folder of a model (`save_pretrained`), or a Hub id.")
ADAPTER_FOLDER = ("adapter_config.json", "Give the folder of an adapter of PEFT (`save_pretrained`), or a Hub id.")


def load_tokenizer(model_args: ModelConfig, training_args: SFTConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer with the end-of-sequence token and the chat template that SFT will use."""
    name = model_args.model_name_or_path or ""
    with named_place("model", name, *MODEL_FOLDER):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
        )
    if training_args.eos_token is not None:
        tokenizer.eos_token = training_args.eos_token
    if tokenizer.eos_token is None:
        raise ValueError(
            f"The tokenizer of `{name}` has no end-of-sequence token, with which each completion is to end. Name one "
            "of its tokens with --eos_token."
        )
    template = training_args.chat_template_path
    if template is not None and template.endswith((".jinja", ".j2")):
        if not Path(template).is_file():
            raise FileNotFoundError(f"--chat_template_path `{template}`: {describe_missing(template)}")
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        with named_place(
            "tokenizer of --chat_template_path", template, "tokenizer_config.json", "Give a .jinja file."
        ):
            source = AutoTokenizer.from_pretrained(template)
        added = [token.content for token in source.added_tokens_decoder.values()]
        missing = [token for token in added if token not in tokenizer.get_vocab()]
        if missing:
            raise ValueError(
                f"`chat_template_path={template}` would add the tokens {missing} to the model, and their embeddings "
                "have no per-example gradient here. Give a .jinja file that uses tokens which the model has."
            )
        tokenizer.chat_template, tokenizer.eos_token = source.chat_template, source.eos_token
    return tokenizer


def pin_day(tokenizer: PreTrainedTokenizerBase, training_args: SFTConfig, day: datetime) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template prints the date of one day, so that a run's tokens do not change at midnight."""
    template = tokenizer.chat_template
    if not prints_date(template):
        return tokenizer
    warn(f"the chat template prints the date; all of this run, resumed or not, has that of its start, {day.date()}.")
    pinned = pin_tokenizer(tokenizer, day)
    if training_args.assistant_only_loss and not has_generation_markers(template):
        # TRL knows a template by its text, and that is another one now.
        pinned.chat_template = pin_template(get_training_chat_template(tokenizer), day)
    return pinned


def build_bare(model_args: ModelConfig, training_args: SFTConfig, peft_config: PeftConfig | None) -> Any:
    """A model with an adapter, if it gets one, without weights."""
    name, trust = model_args.model_name_or_path or "", training_args.trust_remote_code
    with named_place("model", name, *MODEL_FOLDER):
        config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
        if peft_config is None:
            return model
        try:
            return get_peft_model(model, peft_config)
        except NoMatchingPeftModuleError as error:
            linear = sorted(
                {path.split(".")[-1] for path, part in model.named_modules() if isinstance(part, nn.Linear)}
            )
            raise ValueError(
                f"`lora_target_modules={model_args.lora_target_modules}` names no module of {name}. Its linear ones "
                f"are {', '.join(linear)}; `all-linear` takes all but the head."
            ) from error
        except ValueError as error:
            if "lora_dropout" not in str(error):
                raise
            raise ValueError(
                f"`lora_dropout={model_args.lora_dropout}` cannot work on {name}: it is a mixture of experts, whose "
                "routers and experts PEFT trains without dropout only. Set --lora_dropout 0, or leave them out with "
                f"--lora_target_modules {' '.join(ATTENTION)}."
            ) from error


def check_model(model_args: ModelConfig, training_args: SFTConfig, for_influence: bool) -> int:
    """
    Build the model without weights and put the adapter on, if any, so that settings that cannot work fail at once.

    Args:
        model_args ([`~trl.ModelConfig`]): Model and LoRA settings.
        training_args ([`~trl.SFTConfig`]): For `trust_remote_code`.
        for_influence (`bool`): Whether every trainable tensor must have per-example gradients.

    Returns:
        `int`: trainable parameters.
    """
    model = build_bare(model_args, training_args, get_peft_config(model_args))
    if for_influence:
        blocks, layers = find_blocks(model), getattr(training_args, "influence_layers", None)
        select_blocks(blocks, layers, model.config.get_text_config().num_hidden_layers)
    return sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)


def check_adapter(adapter: str, model_args: ModelConfig, training_args: SFTConfig) -> None:
    """
    Check that an adapter can be found and has the shapes of the model's layers; warn if it was trained on another one.
    Without LoRA, that it is a model.

    Raises:
        FileNotFoundError, ValueError: if it cannot be found, or does not fit.
    """
    model_name = model_args.model_name_or_path or ""
    if not model_args.use_peft:
        with named_place("trained model", adapter, *MODEL_FOLDER):
            AutoConfig.from_pretrained(adapter, trust_remote_code=training_args.trust_remote_code)
        return
    with named_place("adapter", adapter, *ADAPTER_FOLDER):
        config = PeftConfig.from_pretrained(adapter)
        weights = load_peft_weights(adapter, device="cpu")
    base = config.base_model_name_or_path
    is_other = base != model_name
    belongs = f" It says that it belongs to {base}." if base and is_other else ""
    config.inference_mode = False
    model = build_bare(model_args, training_args, config)
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    }
    wrong = [name for name, tensor in weights.items() if name in shapes and tuple(tensor.shape) != shapes[name]]
    # Where names alone differ, PEFT knows better than this check: it renames some as it loads them.
    wrong += [name for name in weights if is_other and "lora_" in name and name not in shapes]
    if wrong:
        found, name = tuple(weights[wrong[0]].shape), wrong[0]
        fits = f"is {list(shapes[name])} in that model" if name in shapes else "is no part of that model"
        raise ValueError(
            f"The adapter `{adapter}` does not fit the model `{model_name}`: its `{name}` is {list(found)}, which "
            f"{fits} ({len(wrong)} of {len(weights)} tensors).{belongs} Give the model that it was trained on with "
            "--model_name_or_path, or another adapter."
        )
    if base and is_other:
        warn(f"the adapter {adapter} says that it belongs to {base}, but it is put on {model_name}.")


def hash_folder(name_or_path: str, suffixes: tuple[str, ...] = (".json", ".safetensors")) -> str:
    """Identity of a model or adapter: the content of a local folder, the id of a Hub repository."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return name_or_path
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix in suffixes)
    digest = xxhash.xxh3_128()
    for path in files:
        digest.update(str(path.relative_to(folder)).encode())
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
    return digest.hexdigest()

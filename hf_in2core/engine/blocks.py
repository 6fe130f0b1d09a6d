"""Blocks: the trainable tensors whose per-example gradients can be taken; everything else is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from peft import PeftModel
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Embedding as LoraEmbedding
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from .experts import explain_unsupported


class Block(NamedTuple):
    """
    A trainable tensor: the `parameter` (`"weight"`, `"bias"`) of `module`, in decoder layer `layer`.

    Its `kind` says how its gradients are recorded: as those of a `"linear"` or a `"norm"`, of LoRA on a `"parameter"`,
    of DoRA's `"magnitude"`, of the few `"tokens"` of `trainable_token_indices`, or of one of [`VOCABULARY_KINDS`].
    """

    module: nn.Module
    parameter: str
    layer: int | None
    kind: str = "linear"

    @property
    def tensor(self) -> nn.Parameter:
        """The trainable tensor."""
        return self.module.get_parameter(self.parameter)


Blocks = dict[str, Block]

# Those with a row for every token of the vocabulary; `"tied"` is the input embedding and the output head in one.
VOCABULARY_KINDS = ("head", "embedding", "tied", "lora_embedding")
# The linears of the attention as most families call them.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def explain_idle_blocks(names: list[str]) -> str:
    """Why blocks take no part in the backward of text, or more than one, and what to do."""
    if any(re.search(r"vision|visual|image|audio", name) for name in names):
        return (
            "they belong to a part of the model that text does not reach. Leave it out: "
            '`target_modules=r".*language_model.*_proj"`.'
        )
    return (
        "the adapter may be merged or disabled, or the module is bypassed or called repeatedly. Unmerge and enable "
        "the adapter, or leave these modules out of `target_modules`."
    )


def find_blocks(model: nn.Module, adapter_name: str | None = None) -> Blocks:
    """
    List every trainable tensor of the model, refusing those whose per-example gradients cannot be taken.

    Args:
        model (`torch.nn.Module`):
            Model whose trainable tensors have `requires_grad=True`.
        adapter_name (`str`, *optional*):
            Name of the PEFT adapter, the active one by default, left out of the block names so that they do not depend
            on it.

    Returns:
        `dict[str, Block]`: blocks by name, in the model's order.

    Raises:
        ValueError: if nothing is trainable, or if a trainable tensor is of no kind whose rows can be told apart (the
            tensors are listed by name).
    """
    adapter_name = adapter_name or find_adapter_name(model)
    owners: dict[int, list[tuple[str, nn.Module, str]]] = {}
    refused: dict[str, str] = {}
    blocks: Blocks = {}
    head, embedding = _find_vocabulary_modules(model)
    tied = _find_tied(head, embedding)
    unsupported_parents = _find_unsupported_parents(model)
    for module_name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False):
            if not tensor.requires_grad:
                continue
            name = f"{module_name}.{parameter}"
            reason = next((why for parent, why in unsupported_parents.items() if name.startswith(f"{parent}.")), None)
            if tensor is tied and module is head:
                continue  # recorded with the embedding
            owners.setdefault(id(tensor), []).append((name, module, parameter))
            user, path = _find_user(model, module_name, parameter)
            kind, why = _classify(user, head, embedding)
            if tensor is tied:
                kind, why = "tied", None
            reason = reason or why
            if reason is None:
                blocks[_strip_adapter(name, adapter_name)] = Block(user, path, _layer_index(name), kind)
            else:
                refused[name] = reason
    for names in owners.values():
        if len(names) > 1:
            refused.update({name: f"shared with {names[0][0]}" for name, _, _ in names[1:]})
    if refused:
        shown = "\n".join(f"  - {name}: {reason}" for name, reason in list(refused.items())[:10])
        more = f"\n  … and {len(refused) - 10} more" if len(refused) > 10 else ""
        raise ValueError(
            f"{len(refused)} trainable tensors have no per-example gradient here, and leaving them out would make the "
            f"influence wrong:\n{shown}{more}\n{_advise(model, refused)}"
        )
    if not blocks:
        raise ValueError(
            "No tensor of the model is trainable, so there is no gradient to take the influence of. Pass "
            "`peft_config=LoraConfig(...)`, or load the trained adapter with "
            "`PeftModel.from_pretrained(model, adapter, is_trainable=True)`."
        )
    return blocks


def _advise(model: nn.Module, refused: dict[str, str]) -> str:
    """What to do about tensors that have no per-example gradient."""
    if not isinstance(model, PeftModel):
        return (
            "Train LoRA, `peft_config=LoraConfig(...)`, or freeze these tensors (`requires_grad_(False)`): without an "
            "adapter linear layers, norms, the input embedding and the output head have one."
        )
    advice = "on linear layers"
    if any(".experts." in name for name in refused):
        flag = f"`--lora_target_modules {' '.join(ATTENTION)}`"
        advice = f"of the attention alone, `target_modules={ATTENTION!r}` (of a command {flag})"
    tied = any(reason.startswith("shared") for reason in refused.values())
    untie = " Without `ensure_weight_tying` PEFT trains a copy of each tied matrix." if tied else ""
    return (
        f"Use LoRA, rsLoRA or DoRA {advice}: no LoRA on `lm_head`, `target_parameters` only for routers and the "
        "matrices of experts, `modules_to_save` only for linear layers, norms, the input embedding and "
        f"`lm_head`.{untie}"
    )


def check_not_offloaded(model: nn.Module) -> None:
    """
    Refuse a model with weights offloaded to the CPU or to the disk (`device_map`).

    Raises:
        ValueError: naming the first of them.
    """
    offloaded = [name for name, parameter in model.named_parameters() if parameter.device.type == "meta"]
    if offloaded:
        raise ValueError(
            f"{len(offloaded)} weights are offloaded to the CPU or the disk by the `device_map`, first "
            f"`{offloaded[0]}`: a backward pass keeps every weight that it has loaded, so offloading saves it no "
            "memory, and PEFT puts an adapter there without values. Spread the model over devices that hold all of "
            "it, quantise it, or use a smaller reference model."
        )


def _find_user(model: nn.Module, module_name: str, parameter: str) -> tuple[nn.Module, str]:
    """The module that uses a tensor, and its path there: the layer around what PEFT keeps by the names of adapters."""
    module = model.get_submodule(module_name)
    parent, _, field = module_name.rpartition(".")
    if isinstance(module, nn.ParameterDict):
        return model.get_submodule(parent), f"{field}.{parameter}"
    wrapper, _, side = parent.rpartition(".")
    if isinstance(around := model.get_submodule(wrapper), ParamWrapper) and side.startswith("lora_"):
        return around, f"{side}.{field}.{parameter}"
    return module, parameter


def _find_unsupported_parents(model: nn.Module) -> dict[str, str]:
    """PEFT layers whose tensors are used in ways that are not recorded."""
    parents = {}
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and (reason := explain_unsupported(module)):
            parents[name] = reason
        for variant in (getattr(module, "lora_variant", None) or {}).values():
            if not isinstance(variant, DoraLinearVariant):
                parents[name] = f"the LoRA variant {type(variant).__name__}"
    return parents


def _find_vocabulary_modules(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The output head and the input embedding, as PEFT has wrapped them."""
    if not isinstance(model, (PreTrainedModel, PeftModel)):
        return None, None
    return model.get_output_embeddings(), model.get_input_embeddings()


def _classify(module: nn.Module, head: nn.Module | None, embedding: nn.Module | None) -> tuple[str, str | None]:
    """Kind of the blocks of a module, and why it has none."""
    base = module.get_base_layer() if isinstance(module, (LoraEmbedding, TrainableTokensLayer)) else module
    # Not an embedding that changes weights or gradients by what it has seen.
    if isinstance(base, nn.Embedding) and base.max_norm is None and not base.scale_grad_by_freq:
        is_plain = type(base) is nn.Embedding
        if type(module) is TrainableTokensLayer and isinstance(head, TrainableTokensWrapper):
            return "", "tied to the output head; a chat template from a `.jinja` file adds no tokens to be trained"
        if type(module) is TrainableTokensLayer and is_plain:
            return "tokens", None
        if type(module) is LoraEmbedding and is_plain:
            return "lora_embedding", None
        if module is base and _is_whole(embedding, module) and (is_plain or hasattr(base, "embed_scale")):
            return "embedding", None
    elif type(module) is nn.Linear:
        return ("head", None) if _is_whole(head, module) else ("linear", _refuse_head(module, head))
    elif type(module) is DoraLinearLayer:
        return "magnitude", None
    elif type(module) is ParamWrapper:
        return "parameter", _refuse_head(module, head)
    elif _is_norm(module):
        return "norm", None
    return "", f"a tensor of {type(base).__name__}, none of a kind whose rows can be told apart"


def _is_norm(module: nn.Module) -> bool:
    """Whether a module multiplies what it normalises by a vector, and adds another at most."""
    own = dict(module.named_parameters())
    vectors = own.keys() <= {"weight", "bias"} and all(tensor.dim() == 1 for tensor in own.values())
    return vectors and "norm" in type(module).__name__.lower()


def _refuse_head(module: nn.Module, head: nn.Module | None) -> str | None:
    inside = head is not None and module in set(head.modules())
    return "part of the output head, which counts as a whole (`modules_to_save`) only" if inside else None


def _is_whole(wrapper: nn.Module | None, module: nn.Module) -> bool:
    """Whether a module is the model's own, without PEFT, or the trained copy that `modules_to_save` has made of it."""
    if isinstance(wrapper, ModulesToSaveWrapper):
        return module in wrapper.modules_to_save.children()
    return module is wrapper


def _find_tied(head: nn.Module | None, embedding: nn.Module | None) -> Tensor | None:
    """The matrix that is the output head's and the input embedding's, where both use it as it is."""
    if type(head) is not nn.Linear or not isinstance(embedding, nn.Embedding):
        return None
    return embedding.weight if head.weight is embedding.weight else None


def find_adapter_name(model: nn.Module) -> str | None:
    """Name of the active adapter; `None` of a model that is trained without one."""
    return model.active_adapter if isinstance(model, PeftModel) else None


def _strip_adapter(name: str, adapter_name: str | None) -> str:
    return name if adapter_name is None else re.sub(rf"\.{re.escape(adapter_name)}(?=\.|$)", "", name)


def _layer_index(name: str) -> int | None:
    match = re.search(r"\.(?:layers|h|blocks|layer)\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def select_blocks(blocks: Blocks, influence_layers: str | list[int] | None, num_layers: int) -> Blocks:
    """
    Keep the blocks of some decoder layers (In2Core's layer reduction).

    Args:
        blocks (`dict[str, Block]`):
            Blocks from [`find_blocks`].
        influence_layers (`str` or `list[int]` or `None`):
            `None` for all, `"last:8"` or `"first:8"`, or a list of layer indices (negative ones count from the end).
        num_layers (`int`):
            Number of decoder layers of the model.

    Returns:
        `dict[str, Block]`: the selected blocks, in the same order.

    Raises:
        ValueError: if a layer does not exist or carries no block.
    """
    if influence_layers is None:
        return blocks
    if isinstance(influence_layers, str):
        end, _, count = influence_layers.partition(":")
        if int(count) > num_layers:
            raise ValueError(
                f"`influence_layers={influence_layers!r}` names {count} layers, but the model has {num_layers}. Give "
                "a smaller number, or leave it out for all layers."
            )
        chosen = list(range(num_layers))
        chosen = chosen[-int(count) :] if end == "last" else chosen[: int(count)]
    else:
        chosen = [layer + num_layers if layer < 0 else layer for layer in influence_layers]
    missing = sorted(set(chosen) - {block.layer for block in blocks.values() if block.layer is not None})
    if beyond := [layer for layer in missing if not 0 <= layer < num_layers]:
        raise ValueError(
            f"`influence_layers={influence_layers!r}` names layers {beyond}, but the model has layers 0 to "
            f"{num_layers - 1}. Choose among these, or leave it out for all layers."
        )
    if missing:
        raise ValueError(
            f"`influence_layers={influence_layers!r}` names layers {missing}, which carry no trainable tensor; the "
            f"model has layers 0 to {num_layers - 1}. Choose layers that the adapter covers."
        )
    return {name: block for name, block in blocks.items() if block.layer in set(chosen)}


@contextmanager
def trainable_adapter(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Make the named tensors alone trainable, as [`find_blocks`] expects; put back as they were."""
    adapter = find_adapter_name(model)
    changed = []
    for name, parameter in model.named_parameters():
        wanted = _strip_adapter(name, adapter) in names
        if parameter.requires_grad != wanted:
            parameter.requires_grad_(wanted)
            changed.append(parameter)
    try:
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not parameter.requires_grad)


def adapter_tensors(model: PeftModel, name: str | None = None) -> dict[str, Tensor]:
    """Tensors of an adapter, by default of the active one, by name (without the adapter's own name)."""
    adapter = model.active_adapter if name is None else name
    return {
        _strip_adapter(name, adapter): tensor
        for name, tensor in model.named_parameters()
        if f".{adapter}." in f"{name}."
    }


def read_adapter_settings(model: nn.Module) -> dict[str, Any]:
    """Settings of the active adapter that change what its tensors do, as in its `adapter_config.json`."""
    if not isinstance(model, PeftModel):
        return {}
    settings = model.peft_config[model.active_adapter].to_dict()
    names = ("peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
    return json.loads(json.dumps({name: settings.get(name) for name in names}, default=str))


def count_elements(blocks: Blocks) -> int:
    """Elements of the per-example gradient over all blocks."""
    return sum(block.tensor.numel() for block in blocks.values())

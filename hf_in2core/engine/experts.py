"""LoRA on parameters (`target_parameters`) of a mixture of experts, with the rows of a batch told apart.

PEFT adds `B A` to a parameter before every forward: the tokens of all rows meet in the gradient of that sum.

Of a router's matrix the input `x` and the output's gradient `g` are recorded where it is multiplied with the tokens.
The gradient of `A` is then that of a linear with the input `x` and the output's gradient `B^T g`, that of `B` with
`A x` and `g`.

The matrices of all experts are one parameter. Here `B_e A_e x` is added to what expert `e` makes of a token `x`
instead. Stacked as PEFT stores them, the gradients of `A` and `B` are those of two linears, from and to numbers that
are zero wherever a token has not gone to an expert.
"""

from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .forwards import Forward
from .recorded import Record, record_output


Wrappers = list[ParamWrapper]

# The experts' input and output matrices in Transformers; the first is called otherwise where nothing is gated.
MATRICES = ("gate_up_proj", "up_proj", "down_proj")


def list_wrappers(model: nn.Module) -> dict[nn.Module, Wrappers]:
    """The wrappers that PEFT has nested around each module with `target_parameters`, the outermost first."""
    found: dict[nn.Module, Wrappers] = {}
    for module in model.modules():
        if isinstance(module, ParamWrapper):
            found.setdefault(module.get_base_layer(), []).append(module)
    return found


def explain_unsupported(wrapper: ParamWrapper) -> str | None:
    """Why the gradients of a wrapped parameter cannot be told apart by rows, where they cannot."""
    module: Any = wrapper.get_base_layer()
    name, kind = wrapper.parameter_name, type(module).__name__
    parameter = getattr(module, name)
    if not parameter.dtype.is_floating_point or parameter.element_size() < 2:
        return f"LoRA on the parameter `{name}` of {kind} in {parameter.dtype}"
    if _is_experts(module):
        if name not in MATRICES or parameter.dim() != 3:
            return (
                f"LoRA on `{name}` of the experts {kind}; of their parameters only {', '.join(MATRICES)} can have it"
            )
        if getattr(module, "_is_expert_parallel", False):
            return "LoRA on experts that are spread over processes"
    elif parameter.dim() != 2 or isinstance(module, nn.Embedding):
        return f"LoRA on the parameter `{name}` of {kind}, neither a linear nor experts as Transformers has them"
    return None


def _is_experts(module: nn.Module) -> bool:
    """Whether Transformers computes a module's experts by one function for all models."""
    return hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")


Records = dict[nn.Module, dict[str, Record]]


def make_parameter_forwards(model: nn.Module, records: Records) -> dict[nn.Module, Forward]:
    """
    Forwards of the wrappers of `target_parameters`, with what the gradients of their matrices are made of recorded.

    Args:
        model (`torch.nn.Module`):
            Model with its adapter.
        records (`dict[torch.nn.Module, dict[str, Callable]]`):
            For each recorded wrapper, who is told of its `lora_A` and of its `lora_B`: the input, `[..., in]`, and the
            gradient of the output, `[..., out]`. The leading dimensions are the module's own, or `[tokens, experts per
            token]`.
    """
    forwards: dict[nn.Module, Forward] = {}
    for module, wrappers in list_wrappers(model).items():
        if not records.keys() & {*wrappers}:
            continue
        make = _make_experts_forward if _is_experts(module) else _make_router_forward
        forwards[wrappers[0]] = make(wrappers, records)
    return forwards


def _find_factors(wrapper: ParamWrapper) -> tuple[Tensor, Tensor, float]:
    """`A`, `B` and the scaling of the active adapter, in the precision that PEFT adds them in."""
    adapter, dtype = wrapper.active_adapters[0], wrapper.get_param().dtype
    parts: list[Any] = [wrapper.lora_A[adapter], wrapper.lora_B[adapter]]
    a, b = (part.weight.to(dtype) for part in parts)
    return a, b, wrapper.scaling[adapter]


class _RecordLinear(TorchFunctionMode):
    """Records the products with a matrix of a shape, wherever a module takes them."""

    def __init__(self, shape: torch.Size, record: Record) -> None:
        super().__init__()
        self.shape = shape
        self.record = record

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is F.linear and args[1].shape == self.shape:
            return record_output(found, args[0], self.record)
        return found


def _make_router_forward(wrappers: Wrappers, records: Records) -> Forward:
    """Of a module that multiplies its input with a matrix by `F.linear`."""
    (wrapper,) = wrappers
    original = wrapper.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if wrapper.merged or wrapper.disable_adapters:
            return original(*args, **kwargs)
        a, b, scaling = _find_factors(wrapper)

        def record(x: Tensor, grad_output: Tensor) -> None:
            a_, b_ = a.to(x.dtype), b.to(grad_output.dtype)
            for side, tell in records[wrapper].items():
                if side == "lora_A":
                    tell(x, grad_output @ b_ * scaling)
                else:
                    tell(x @ a_.T * scaling, grad_output)

        with _RecordLinear(wrapper.get_param().shape, record):
            return original(*args, **kwargs)

    return forward


def _make_experts_forward(wrappers: Wrappers, records: Records) -> Forward:
    """Of the outermost wrapper of some experts: of tokens, `[tokens, hidden]`, and the experts and weights of each."""
    experts: Any = wrappers[0].get_base_layer()
    by_name = {wrapper.parameter_name: wrapper for wrapper in wrappers}
    original = wrappers[0].forward

    def forward(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if any(wrapper.merged or wrapper.disable_adapters for wrapper in wrappers):
            return original(hidden, index, weights)
        route = _Route(index, experts.num_experts)
        x = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", route, hidden, by_name, records)
        x = experts._apply_gate(x) if experts.has_gate else experts.act_fn(x)
        x = _project(experts, "down_proj", route, x, by_name, records)
        if getattr(experts, "has_post_expert_norm", False):
            x = experts.post_expert_norm(x)
        x = x * weights.flatten()[route.order, None]
        return route.put_back(x).sum(1).to(hidden.dtype)

    return forward


class _Route:
    """
    The pairs of a token and an expert, sorted by expert.

    Args:
        index (`torch.Tensor` of shape `[tokens, experts per token]`):
            The experts of each token.
        num_experts (`int`):
            Experts that there are.
    """

    def __init__(self, index: Tensor, num_experts: int) -> None:
        self.shape = tuple(index.shape)
        self.num_experts = num_experts
        self.expert, self.order = index.flatten().sort(stable=True)
        self.token = self.order // index.shape[1]
        self.counts = torch.bincount(self.expert, minlength=num_experts).tolist()

    def multiply(self, x: Tensor, matrices: Tensor) -> Tensor:
        """Each pair's vector, `[pairs, in]`, times the matrix of its expert, `[experts, in, out]`."""
        parts = zip(x.split(self.counts), matrices.unbind(), strict=True)
        return torch.cat([part @ matrix for part, matrix in parts if len(part)])

    def put_back(self, x: Tensor) -> Tensor:
        """Vectors of the pairs in the order of the tokens, `[tokens, experts per token, ...]`."""
        return torch.empty_like(x).index_copy(0, self.order, x).unflatten(0, self.shape)

    def spread(self, x: Tensor, by_token: bool, expert_first: bool) -> Tensor:
        """
        Vectors of the pairs, `[pairs, rank]`, at the places of their experts among zeros.

        Args:
            x (`torch.Tensor`):
                The vectors.
            by_token (`bool`):
                Whether the pairs of a token share a vector, `[tokens, experts * rank]`; otherwise each has its own,
                `[tokens, experts per token, experts * rank]`.
            expert_first (`bool`):
                Whether the experts are the slower of the two dimensions that become one.
        """
        rows = self.token if by_token else self.order
        size = (self.shape[0] if by_token else len(self.order), self.num_experts)
        spread = x.new_zeros(*size, x.shape[1]).index_put_((rows, self.expert), x)
        spread = (spread if expert_first else spread.transpose(1, 2)).flatten(1)
        return spread if by_token else spread.unflatten(0, self.shape)


def _project(
    experts: Any,
    name: str,
    route: _Route,
    x: Tensor,
    wrappers: dict[str, ParamWrapper],
    records: Records,
) -> Tensor:
    """One matrix of every expert with its LoRA, of tokens (`[tokens, in]`) or of pairs (`[pairs, in]`), by pairs."""
    by_token = name != "down_proj"
    pairs = x[route.token] if by_token else x
    matrices: Tensor = getattr(experts, name)
    y = route.multiply(pairs, matrices if experts.is_transposed else matrices.transpose(1, 2))
    if experts.has_bias:
        y = y + getattr(experts, f"{name}_bias")[route.expert].to(y.dtype)
    if name not in wrappers:
        return y
    wrapper = wrappers[name]
    record = records.get(wrapper, {})
    a, b, scaling = _find_factors(wrapper)

    def record_a(seen: Tensor, grad_output: Tensor) -> None:
        seen = seen if by_token else route.put_back(seen)
        record["lora_A"](seen, route.spread(grad_output, by_token, expert_first=True))

    def record_b(seen: Tensor, grad_output: Tensor) -> None:
        record["lora_B"](route.spread(seen, by_token=False, expert_first=False), route.put_back(grad_output))

    inner = route.multiply(pairs, a.unflatten(0, (route.num_experts, -1)).transpose(1, 2))
    if "lora_A" in record:
        inner = record_output(inner, x, record_a)
    inner = inner * scaling
    outer = route.multiply(inner, b.unflatten(1, (-1, route.num_experts)).permute(2, 1, 0))
    if "lora_B" in record:
        outer = record_output(outer, inner, record_b)
    return y + outer

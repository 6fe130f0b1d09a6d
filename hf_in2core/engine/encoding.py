"""Gradients as the bytes of a store: in full, in bfloat16, or in 8 bits with a scale for every group of elements."""

import torch
from torch import Tensor
from torch.nn import functional as F


# Elements that share a scale, 3 % of the room. A row's largest element would coarsen all others, the more the larger
# the block: one scale for a row left nearly twice the error in blocks of about a thousand (`benchmarks/index.py`).
GROUP = 128
SCALE_BYTES = 4


def count_bytes(num_elements: int, dtype: torch.dtype) -> int:
    """Bytes of so many elements of a row's gradient in a precision."""
    scales = SCALE_BYTES * -(-num_elements // GROUP) if dtype is torch.int8 else 0
    return num_elements * dtype.itemsize + scales


def choose_store_dtype(
    budget_gb: float, num_rows: int, elements: dict[str, int], precisions: list[torch.dtype]
) -> torch.dtype | None:
    """
    The precision in which the gradients of all rows fit into a budget of disk.

    Args:
        budget_gb (`float`):
            Budget in GB (10^9 bytes).
        num_rows (`int`):
            Rows.
        elements (`dict[str, int]`):
            Elements of each block.
        precisions (`list[torch.dtype]`):
            Those to choose from, the finest first.

    Returns:
        `torch.dtype` or `None`: the first that fits, `None` where none does.
    """
    for dtype in precisions:
        if num_rows * sum(count_bytes(count, dtype) for count in elements.values()) <= budget_gb * 1e9:
            return dtype
    return None


def encode(gradients: Tensor, dtype: torch.dtype) -> Tensor:
    """
    The bytes of some rows' gradients of one block.

    In 8 bits a row is the float32 scales of its groups of 128 elements, one after the other, then an int8 for each
    element; an element is its int8 times its group's scale, off by half of that at most.

    Args:
        gradients (`torch.Tensor` of shape `[B, elements]`):
            The gradients.
        dtype (`torch.dtype`):
            The precision; `torch.int8` for 8 bits.

    Returns:
        `torch.Tensor` of shape `[B, bytes]`, uint8, on the same device.
    """
    if dtype is not torch.int8:
        return gradients.to(dtype).contiguous().view(torch.uint8)
    num_elements = gradients.shape[1]
    size = min(GROUP, num_elements)
    groups = F.pad(gradients, (0, -num_elements % size)).float().unflatten(1, (-1, size))
    scales = groups.abs().amax(2) / 127
    steps = torch.where(scales > 0, scales, torch.ones_like(scales))
    values = (groups / steps[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(1)[:, :num_elements]
    return torch.cat([scales.contiguous().view(torch.uint8), values.contiguous().view(torch.uint8)], dim=1)


def decode(data: Tensor, num_elements: int, dtype: torch.dtype) -> Tensor:
    """The gradients `[B, num_elements]` that [`encode`] made `data` of; float32 from 8 bits, else in `dtype`."""
    if dtype is not torch.int8:
        return data.view(dtype)
    size = min(GROUP, num_elements)
    # Copied: a slice of one row counts as contiguous, with a stride of whole rows that need not be one of floats.
    scales = data[:, : count_bytes(num_elements, dtype) - num_elements].clone(memory_format=torch.contiguous_format)
    scales = scales.flatten().view(torch.float32).view(len(data), -1)
    values = F.pad(data[:, -num_elements:].view(torch.int8).float(), (0, -num_elements % size))
    return (values.unflatten(1, (-1, size)) * scales[..., None]).flatten(1)[:, :num_elements]

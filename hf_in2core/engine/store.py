"""Per-example gradients of the fit pass on disk: the passes after it read them instead of running the model."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .state import logger


# Bytes read at a time.
READ_BYTES = 2**28
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16"}


def choose_store_dtype(budget_gb: float, num_rows: int, num_elements: int, full: torch.dtype) -> torch.dtype | None:
    """
    The precision in which the gradients of all rows fit into a budget of disk.

    Args:
        budget_gb (`float`):
            Budget in GB (10^9 bytes).
        num_rows, num_elements (`int`):
            Rows, and elements of the gradient of each.
        full (`torch.dtype`):
            Precision in which they are computed.

    Returns:
        `torch.dtype` or `None`: `full` where that fits, else bfloat16, else `None`.
    """
    for dtype in (full, torch.bfloat16):
        if num_rows * num_elements * dtype.itemsize <= budget_gb * 1e9:
            return dtype
    return None


@dataclass
class StoredChunk:
    """
    Gradients of consecutive rows in a finished file, row by row in their order; zeros for a row without a loss token.

    Attributes:
        path (`pathlib.Path`):
            The file.
        num_rows (`int`):
            Rows in it.
        dtype (`torch.dtype`):
            Precision in which they are stored.
        offsets, elements (`dict[str, int]`):
            Where each block begins in the file, in bytes, and its elements per row.
    """

    path: Path
    num_rows: int
    dtype: torch.dtype
    offsets: dict[str, int]
    elements: dict[str, int]

    def read(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Rows and their gradients of one block, `[m, elements]`, as many rows at a time as fit into a buffer."""
        row_bytes = self.elements[name] * self.dtype.itemsize
        step = max(READ_BYTES // row_bytes, 1)
        with open(self.path, "rb") as file:
            for start in range(0, self.num_rows, step):
                end = min(start + step, self.num_rows)
                # In memory as torch aligns it: products of the same numbers elsewhere can differ in the last bits.
                data = torch.empty((end - start) * row_bytes, dtype=torch.uint8)
                file.seek(self.offsets[name] + start * row_bytes)
                if file.readinto(data.numpy().data) != len(data):
                    raise OSError(f"{self.path} ends before its last row.")
                yield slice(start, end), data.view(self.dtype).view(end - start, -1)


@dataclass
class GradientStore:
    """
    Files of per-example gradients beside the other state of a run, one for each chunk of rows.

    A file is in the safetensors format (a tensor `[rows, elements]` for every block). It is written under a temporary
    name and renamed when the chunk is complete, so that a killed run leaves whole chunks or none.

    Attributes:
        folder (`pathlib.Path`):
            Folder of the run's state.
        fingerprint (`str`):
            Identity of the run.
        elements (`dict[str, int]`):
            Elements of each block.
        dtype (`torch.dtype`):
            Precision in which gradients are stored.
    """

    folder: Path
    fingerprint: str
    elements: dict[str, int]
    dtype: torch.dtype
    _keep: Callable[[str, np.ndarray, Tensor], None] | None = field(default=None, init=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(self.elements.values()) * self.dtype.itemsize

    def check_disk(self, num_rows: int) -> None:
        """
        Check that the gradients of `num_rows` rows fit on the disk.

        Raises:
            ValueError: if they do not, with what they need and what there is.
        """
        existing = sum(path.stat().st_size for path in self.folder.glob("gradients-*.safetensors"))
        needed = num_rows * self.row_bytes - existing
        free = shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(
                f"The gradient store of {num_rows:,} rows needs {needed / 1e9:.2f} GB in {self.folder}, but the disk "
                f"has {free / 1e9:.2f} GB left. Set `gradient_store_gb=0` (the model then runs in every pass), or "
                "give another `output_dir`."
            )

    def _path(self, first: int, last: int) -> Path:
        return self.folder / f"gradients-{first:09d}-{last:09d}.safetensors"

    def _layout(self, num_rows: int) -> tuple[bytes, dict[str, int], int]:
        """Header of a file, where each block begins, and the size of the whole file."""
        entries: dict[str, object] = {"__metadata__": {"fingerprint": self.fingerprint}}
        offsets, position = {}, 0
        for name, elements in self.elements.items():
            end = position + num_rows * elements * self.dtype.itemsize
            shape = [num_rows, elements]
            entries[name] = {"dtype": DTYPE_NAMES[self.dtype], "shape": shape, "data_offsets": [position, end]}
            offsets[name], position = position, end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + offset for name, offset in offsets.items()}
        return header, offsets, len(header) + position

    @contextmanager
    def write(self, first: int, last: int) -> Iterator[None]:
        """Let [`keep`] write the gradients of rows `first:last`; the file appears when that ends without error."""
        header, offsets, size = self._layout(last - first)
        path = self._path(first, last)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

        def keep(name: str, indices: np.ndarray, gradients: Tensor) -> None:
            rows = gradients.detach().flatten(1).to(self.dtype).cpu().contiguous().view(torch.uint8).numpy()
            for index, row in zip(indices, rows, strict=True):
                position = offsets[name] + int(index) * len(row)
                if os.pwrite(handle, row.data, position) != len(row):
                    raise OSError(f"{temporary} could not be written whole: the disk may be full.")

        try:
            os.ftruncate(handle, size)
            os.pwrite(handle, header, 0)
            self._keep = keep
            yield
            os.fsync(handle)
            os.replace(temporary, path)
        finally:
            self._keep = None
            os.close(handle)
            temporary.unlink(missing_ok=True)

    def keep(self, name: str, indices: np.ndarray, gradients: Tensor) -> None:
        """Write the gradients `[B, ...]` of a block for the rows at `indices` of the chunk being written, if any."""
        if self._keep is not None:
            self._keep(name, indices, gradients)

    def read(self, first: int, last: int) -> StoredChunk | None:
        """The finished chunk of rows `first:last`; `None` where there is none, with a warning where it is damaged."""
        path = self._path(first, last)
        if not path.exists():
            return None
        header, offsets, size = self._layout(last - first)
        try:
            with safe_open(path, framework="pt"), open(path, "rb") as file:
                intact = file.read(len(header)) == header and path.stat().st_size == size
        except (SafetensorError, OSError) as error:
            logger.warning("%s is damaged (%s) and is not used; the model runs instead.", path, error)
            return None
        if not intact:
            logger.warning("%s belongs to another run and is not used; the model runs instead.", path)
            return None
        return StoredChunk(path, last - first, self.dtype, offsets, self.elements)

    def remove(self) -> None:
        """Remove all files of the store."""
        for path in self.folder.glob("gradients-*.safetensors"):
            path.unlink(missing_ok=True)

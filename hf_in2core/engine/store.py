"""Per-example gradients of the pool on disk: passes read them instead of running the model."""

import json
import os
import platform
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .encoding import count_bytes, decode, encode
from .state import hash_json, logger


# Bytes read at a time, as they are in float32.
READ_BYTES = 2**28
DTYPE_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "U8"}
# Seconds after which a file that no process of this machine writes to is nobody's.
LEFT_AFTER = 3600
# What a file of an index says of itself beside its fingerprint, and in how many characters.
NOTES = {"digest": 32, "error": 12, "agreement": 12}


class StoredPart(NamedTuple):
    """Some of the rows that were asked for: in one file, at `rows` of it, and where in the answer they belong."""

    path: Path
    offsets: dict[str, int]
    rows: np.ndarray
    places: np.ndarray


@dataclass
class StoredRows:
    """
    Gradients of some rows in finished files; zeros for a row without a loss token.

    Attributes:
        parts (`list[StoredPart]`):
            Where they are.
        num_rows (`int`):
            How many.
        dtype (`torch.dtype`):
            Precision in which they are stored.
        elements (`dict[str, int]`):
            Elements of each block per row.
    """

    parts: list[StoredPart]
    num_rows: int
    dtype: torch.dtype
    elements: dict[str, int]

    def read(self, name: str, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Places of rows and their gradients of one block, `[m, elements]`, as many as fit into a buffer at a time."""
        row_bytes = count_bytes(self.elements[name], self.dtype)
        step = max(READ_BYTES // (self.elements[name] * max(self.dtype.itemsize, 4)), 1)
        for part in self.parts:
            with open(part.path, "rb") as file:
                for start in range(0, len(part.rows), step):
                    rows = part.rows[start : start + step]
                    # In memory as torch aligns it: products of the same numbers elsewhere can differ in the last bits.
                    data = torch.empty(len(rows) * row_bytes, dtype=torch.uint8)
                    position = 0
                    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
                        size = len(run) * row_bytes
                        file.seek(part.offsets[name] + int(run[0]) * row_bytes)
                        if file.readinto(data.numpy()[position : position + size].data) != size:
                            raise OSError(f"{part.path} ends before its last row.")
                        position += size
                    found = decode(data.view(len(rows), -1).to(device), self.elements[name], self.dtype)
                    yield part.places[start : start + step], found.to(dtype)

    def read_all(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Gradients of one block of all the rows together, `[num_rows, elements]`."""
        gradients = torch.empty(self.num_rows, self.elements[name], device=device, dtype=dtype)
        for places, found in self.read(name, device, dtype):
            gradients[torch.from_numpy(places).to(device)] = found
        return gradients


@dataclass
class GradientStore:
    """
    Files of per-example gradients, one for each chunk of rows: of one run, or an index that is kept for others.

    A file is in the safetensors format: for every block a tensor `[rows, elements]`, or `[rows, bytes]` of uint8 as
    [`encode`] makes them in 8 bits. It is written under a temporary name and renamed when the chunk is complete, so
    that a killed run leaves whole chunks or none. Files of an index carry a digest of their content.

    Attributes:
        folder (`pathlib.Path`):
            Where the files are.
        fingerprint (`str`):
            Identity of the run, or of what the gradients of an index are of.
        elements (`dict[str, int]`):
            Elements of each block.
        dtype (`torch.dtype`):
            Precision in which gradients are stored; `torch.int8` for 8 bits.
        kept (`bool`):
            Whether it is an index: filled before any other pass over the pool, which all read it then.
        identity (`dict[str, Any]`):
            What the fingerprint of an index is the hash of.
    """

    folder: Path
    fingerprint: str
    elements: dict[str, int]
    dtype: torch.dtype
    kept: bool = False
    identity: dict[str, Any] = field(default_factory=dict)
    _keep: Callable[[str, np.ndarray, Tensor], None] | None = field(default=None, init=False)
    _unusable: set[Path] = field(default_factory=set, init=False)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(count_bytes(count, self.dtype) for count in self.elements.values())

    def list_files(self) -> list[tuple[int, int, Path]]:
        """Finished files, by their first row and one past their last."""
        found = []
        for path in self.folder.glob("gradients-*.safetensors"):
            with suppress(ValueError):
                first, last = map(int, path.stem.split("-")[1:])
                found.append((first, last, path))
        return sorted(found)

    def check_disk(self, num_rows: int) -> None:
        """
        Check that the gradients of `num_rows` rows fit on the disk.

        Raises:
            ValueError: if they do not, with what they need and what there is.
        """
        missing = sum(last - first for first, last in self.list_missing(0, num_rows, with_content=False))
        needed = missing * self.row_bytes
        place = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise ValueError(
                f"The gradient store of {num_rows:,} rows needs {needed / 1e9:.2f} GB in {self.folder}, but the disk "
                f"has {free / 1e9:.2f} GB left. Set `gradient_store_gb=0` (the model then runs in every pass), or "
                f"give another `{'gradient_store_dir' if self.kept else 'output_dir'}`."
            )

    def _layout(self, num_rows: int, notes: dict[str, str]) -> tuple[bytes, dict[str, int], int]:
        """Header of a file, where each block begins, and the size of the whole file."""
        entries: dict[str, object] = {"__metadata__": {"fingerprint": self.fingerprint, **notes}}
        offsets, position = {}, 0
        for name, elements in self.elements.items():
            row_bytes = count_bytes(elements, self.dtype)
            end = position + num_rows * row_bytes
            shape = [num_rows, row_bytes if self.dtype is torch.int8 else elements]
            entries[name] = {"dtype": DTYPE_NAMES[self.dtype], "shape": shape, "data_offsets": [position, end]}
            offsets[name], position = position, end
        text = json.dumps(entries).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        offsets = {name: len(header) + offset for name, offset in offsets.items()}
        return header, offsets, len(header) + position

    @contextmanager
    def write(self, first: int, last: int) -> Iterator[dict[str, float]]:
        """
        Let [`keep`] write the gradients of rows `first:last`; the file appears when that ends without error.

        Yields:
            `dict[str, float]`: for the `error` and `agreement` of an index's file, as of [`StoreError`].
        """
        header, offsets, size = self._layout(last - first, _make_notes() if self.kept else {})
        path = self.folder / f"gradients-{first:09d}-{last:09d}.safetensors"
        temporary = name_temporary(path)
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)

        def keep(name: str, indices: np.ndarray, gradients: Tensor) -> None:
            rows = encode(gradients.detach().flatten(1), self.dtype).cpu().numpy()
            for index, row in zip(indices, rows, strict=True):
                position = offsets[name] + int(index) * len(row)
                if os.pwrite(handle, row.data, position) != len(row):
                    raise OSError(f"{temporary} could not be written whole: the disk may be full.")

        found: dict[str, float] = {}
        try:
            os.ftruncate(handle, size)
            self._keep = keep
            yield found
            if self.kept:
                notes = _make_notes(**found)
                notes["digest"] = _digest(handle, len(header), notes)
                header, _, _ = self._layout(last - first, notes)
            os.pwrite(handle, header, 0)
            os.fsync(handle)
            os.replace(temporary, path)
            self._unusable.discard(path)
        finally:
            self._keep = None
            os.close(handle)
            temporary.unlink(missing_ok=True)

    def keep(self, name: str, indices: np.ndarray, gradients: Tensor) -> None:
        """Write the gradients `[B, ...]` of a block for the rows at `indices` of the chunk being written, if any."""
        if self._keep is not None:
            self._keep(name, indices, gradients)

    def find(self, positions: np.ndarray) -> StoredRows | None:
        """
        The rows at sorted `positions` of the pool in intact files, whatever chunks they were written in.

        Returns:
            [`StoredRows`] or `None`: `None` where not all of them are there, with a warning for each file that is
            damaged or another run's.
        """
        parts, missing = [], np.ones(len(positions), dtype=bool)
        for first, last, path in self.list_files():
            start, end = np.searchsorted(positions, [first, last])
            places = start + np.flatnonzero(missing[start:end])
            if len(places) and (offsets := self._check(path, last - first)) is not None:
                parts.append(StoredPart(path, offsets, positions[places] - first, places))
                missing[places] = False
        return None if missing.any() else StoredRows(parts, len(positions), self.dtype, self.elements)

    def list_missing(self, start: int, end: int, with_content: bool = True) -> list[tuple[int, int]]:
        """Runs of rows between `start` and `end` that are in no intact file; files are read whole `with_content`."""
        missing = np.ones(end - start, dtype=bool)
        for first, last, path in self.list_files():
            part = missing[max(first - start, 0) : max(last - start, 0)]
            if part.any() and self._check(path, last - first, with_content) is not None:
                part[:] = False
        edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(int))) + start
        return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))

    def _check(self, path: Path, num_rows: int, with_content: bool = True) -> dict[str, int] | None:
        """Where each block begins in a file; `None`, with one warning for each file, where it cannot be used."""
        try:
            stat = path.stat()
            notes, damage = _inspect(path, stat.st_mtime_ns, stat.st_size, with_content)
            header, offsets, size = self._layout(num_rows, {name: notes[name] for name in NOTES if name in notes})
            with open(path, "rb") as file:
                found = file.read(len(header))
        except FileNotFoundError:  # replaced or taken away meanwhile
            return None
        if damage is not None:
            reason = f"is damaged ({damage})"
        elif notes.get("fingerprint") != self.fingerprint:
            reason = "belongs to another run"
        elif self.kept and not NOTES.keys() <= notes.keys():
            reason = f"is damaged (it says nothing of its {', '.join(name for name in NOTES if name not in notes)})"
        elif found != header or stat.st_size != size:
            reason = "is damaged (its layout is not that of these gradients)"
        else:
            return offsets
        if path not in self._unusable:
            self._unusable.add(path)
            also = " and it is removed once they have" if self.kept else ""
            logger.warning("%s %s and is not used: its rows pass the model again%s.", path, reason, also)
        return None

    def remove_unusable(self) -> None:
        """Remove the files of an index that were found damaged or another run's, when their rows are in others."""
        for path in self._unusable:
            with suppress(OSError):  # nobody reads it
                path.unlink()
        self._unusable.clear()

    def read_error(self) -> tuple[float, float] | None:
        """What rounding has done to an index, `(error, agreement)` as of [`StoreError`]: means over its files."""
        if self.dtype not in (torch.bfloat16, torch.int8):
            return None
        found = []
        for first, last, path in self.list_files():
            if self._check(path, last - first) is not None:
                notes = _inspect(path, path.stat().st_mtime_ns, path.stat().st_size, True)[0]
                found.append((last - first, float(notes["error"]), float(notes["agreement"])))
        weights, errors, agreements = np.array(found or np.zeros((0, 3))).T
        known = np.isfinite(errors) & np.isfinite(agreements)
        if not known.any():
            return None
        weights = weights[known] / weights[known].sum()
        return float(np.sqrt(weights @ errors[known] ** 2)), float(weights @ agreements[known])

    def sweep(self) -> None:
        """Remove what is half written by processes of this machine that are no more, or by nobody for an hour."""
        for path in self.folder.glob(".*.tmp"):
            *_, machine, process, _, _ = ["", "", *path.name.split(".")]
            with suppress(OSError):  # another process sweeps too
                if machine == _name_machine() and process.isdigit():
                    is_left = not _is_running(int(process))
                else:
                    is_left = time.time() - path.stat().st_mtime > LEFT_AFTER
                if is_left:
                    path.unlink()

    def remove(self) -> None:
        """Remove all files of the store."""
        for _, _, path in self.list_files():
            path.unlink(missing_ok=True)


@cache
def _name_machine() -> str:
    """What the numbers of processes are of: containers and machines can have one name, and a number comes again."""
    parts = [platform.node()]
    with suppress(OSError):  # where it is not Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(os.stat("/proc/self/ns/pid").st_ino)]
    return hash_json(parts)[:12]


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def name_temporary(path: Path) -> Path:
    """A new name beside a file under which it is written, which tells who writes it."""
    return path.with_name(f".{path.name}.{_name_machine()}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def _make_notes(error: float = float("nan"), agreement: float = float("nan")) -> dict[str, str]:
    """Notes of a file, as long whatever they say."""
    return {"digest": "0" * NOTES["digest"], "error": f"{error:12.5e}", "agreement": f"{agreement:12.5e}"}


def _digest(handle: int, start: int, notes: dict[str, str]) -> str:
    """Hash of a file's notes and of what it holds from byte `start` on."""
    digest = xxhash.xxh3_128(json.dumps([notes.get(name) for name in NOTES if name != "digest"]).encode())
    while data := os.pread(handle, 2**24, start):
        digest.update(data)
        start += len(data)
    return digest.hexdigest()


@cache
def _inspect(path: Path, modified: int, size: int, with_content: bool) -> tuple[dict[str, str], str | None]:
    """Metadata of a file as it was then, and what is wrong with it or, if that is asked, with its content."""
    try:
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        return {}, str(error)
    if with_content and "digest" in notes:
        handle = os.open(path, os.O_RDONLY)
        try:
            start = 8 + int.from_bytes(os.pread(handle, 8, 0), "little")
            if _digest(handle, start, notes) != notes["digest"]:
                return notes, "its content is not what was written"
        finally:
            os.close(handle)
    return notes, None

"""Loads one tensor, or rows of one, to a device: small ones in the calling thread, large ones with the pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from weightload import _C
from weightload._base.dtypes import TORCH_DTYPES, torch_shape
from weightload._base.handlers import pass_on
from weightload._base.plain_torch import empty, plainly
from weightload._base.printable import printable
from weightload._load.start import Reading, Source, Wanted, start
from weightload._parts.rows import Run
from weightload._parts.shards import Part
from weightload.errors import OutOfMemoryError, TensorError, located

# Bytes from which the pipeline to an accelerator, which makes a ring, is faster than a read and a copy.
LEAST_FOR_PIPELINE = 1 << 20
# Bytes of a run of rows, on average, from which a loader takes over.
LEAST_RUN = 1 << 20


@plainly
def fetch(
    reader: _C.TensorReader,
    number: int,
    device: torch.device,
    backend: str,
    runs: list[Run] | None = None,
) -> torch.Tensor:
    """A tensor, or runs of its rows (see ``rows.Rows``) one behind the other, in memory that nothing else has.

    ``backend="mmap"``: a view of a mapping where that can be (CPU, one large run, aligned), brought in by threads.

    Raises:
        ReadError, TensorError, OutOfMemoryError: as ``safetensors_weights_iterator``.
    """
    dtype, shape, begin, end = reader.info(number)
    total = end - begin
    extents = [stop - start for start, stop in runs or ()]
    if runs is not None:
        total = row_bytes(dtype, shape, total) * sum(extents)
    least = _C.TensorReader.LEAST_FOR_THREADS if device.type == "cpu" else LEAST_FOR_PIPELINE
    # Many small runs would be as many tensors to a loader.
    if total < least or total < len(extents) * LEAST_RUN:
        read: torch.Tensor = reader.read(number) if runs is None else reader.read_rows(number, runs)
        return read if device.type == "cpu" else copied(read, device)
    part = reader.with_parts([(number, None)] if runs is None else [(number, run) for run in runs])
    source = Source.of([part], most_bytes=total)
    if len(part) == 1:
        with start(source, device, reading=Reading(backend)) as weights:
            tensor: torch.Tensor = next(weights)[1]
            return tensor
    wide = torch_shape(dtype, tuple(shape))[1:]
    whole = empty((sum(extents), *wide), TORCH_DTYPES[dtype], device)
    with start(source, device, reading=Reading(backend), places=torch.split(whole, extents)) as weights:
        for _ in weights:
            pass
    return whole


@plainly
def fetch_part(reader: _C.TensorReader, number: int, device: torch.device, part: Part) -> torch.Tensor:
    """Less than whole rows of a tensor, read by threads, in memory of its own.

    Raises:
        ReadError, TensorError, OutOfMemoryError: as ``safetensors_weights_iterator``.
    """
    file = reader.with_parts([(number, None)])
    (name,) = file.names()
    source = Source.of([file], most_bytes=file.bytes_of([0]))
    with start(source, device, Wanted(parts={name: part}), reading=Reading("pread")) as weights:
        tensor: torch.Tensor = next(weights)[1]
        return tensor


def row_bytes(dtype: str, shape: Sequence[int], total: int) -> int:
    """Bytes of a row of the first dimension as torch counts it; 0 without rows."""
    counted = torch_shape(dtype, tuple(shape))
    return total // counted[0] if counted and counted[0] else 0


def find(reader: _C.TensorReader, name: str) -> int:
    """A tensor's number.

    Raises:
        TensorError: there is no tensor of that name, in safetensors' words.
    """
    number = reader.find(name)
    if number is None:
        raise no_such_tensor(reader, name)
    return number


def copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that owns its memory, on a device, with the same bytes.

    A copy of truth values makes ones of odd ones; of packed dtypes torch has no kernel for what deterministic
    algorithms do with new memory.
    """
    whole = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return whole.to(device, copy=True, memory_format=torch.contiguous_format).view(tensor.dtype)


def no_such_tensor(reader: _C.TensorReader, name: object) -> TensorError | TypeError:
    if not isinstance(name, str):
        return TypeError(f"argument 'name': must be a str, not {type(name).__name__}")
    return located(TensorError(f"File does not contain tensor {printable(name)}"), reader.file.path, name)


def load_all(file: _C.CheckpointFile, device: torch.device, backend: str) -> dict[str, torch.Tensor]:
    """Every tensor of an open file, by offset."""
    if device.type != "cpu":
        return dict(start(Source.of([file]), device))
    if file.size < _C.TensorReader.LEAST_FOR_THREADS:
        reader = _C.TensorReader(file)
        # Bytes that are not in the page cache are read before anyone touches them: errors are then no SIGBUS.
        if backend == "pread" or reader.is_at_hand(0, file.size):
            return {name: reader.get(name, backend == "mmap") for name in file.names()}
    memory = meminfo()
    most = memory.get("MemTotal", 0) + memory.get("SwapTotal", 0)
    # Said before memory is filled, with a sparse giant say, which would end the process.
    if most and file.size > most and _private_bytes(file, backend) > most:
        what = f"{file.path}: {file.size} bytes do not fit into the machine's {most}"
        raise located(OutOfMemoryError(what), file.path)
    # A file that does not fit into the page cache (MemAvailable: no swapping) is read as it is touched. That is the one
    # case in which bytes that cannot be read end the process: all of them cannot be in memory before anyone looks.
    read_ahead = "MemAvailable" not in memory or file.size <= memory["MemAvailable"]
    return dict(start(Source.of([file]), device, reading=Reading(backend, read_ahead)))


def _private_bytes(file: _C.CheckpointFile, backend: str) -> int:
    """Bytes that loading all of a file puts into private memory: with mappings, of tensors that lie misaligned."""
    if backend == "pread":
        return file.size
    reader = _C.TensorReader(file)
    return sum(end - begin for number, (*_, begin, end) in enumerate(file.tensors()) if not reader.can_map(number))


def meminfo() -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError as failed:
        pass_on(failed)
        return {}
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}

"""safe_open: a handle on one file that gives out tensors one at a time, with safetensors' names and meanings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from safetensors import safe_open as safetensors_open  # now: ours may be put in its place later

from weightload import _C
from weightload._api.prefetch import PrefetchLoader, start_prefetch
from weightload._base.addresses import is_address
from weightload._base.dtypes import PACK, torch_shape
from weightload._base.paths import Path, as_text, path_list
from weightload._base.plain_torch import plainly
from weightload._checkpoint.selection import open_files
from weightload._group.cached import cache_of, require_cache
from weightload._load import devices
from weightload._load.fetch import copied, fetch, fetch_part, find, load_all, no_such_tensor, row_bytes
from weightload._load.options import Backend, device_of
from weightload._parts.rows import about_last_dimension, box_of, is_basic, plan_rows
from weightload._parts.shards import shape_of
from weightload.errors import WeightLoadError

# safetensors' names for torch. Other frameworks are its own business.
TORCH_NAMES = ("pt", "torch", "pytorch")


class TensorMeta(NamedTuple):
    """A tensor's entry in the header."""

    dtype: str
    """The format's name, such as ``"BF16"``."""
    shape: list[int]
    """In elements; of F4 too, where torch counts pairs."""
    data_offsets: tuple[int, int]
    """Bytes from the end of the header."""


class safe_open:
    """A safetensors file, its header checked, from which tensors are read one by one.

    ``with safe_open(path) as f: f.get_tensor(name)``; without ``with`` the file stays open until the handle is gone.
    Threads may share a handle. ``name in f``, ``len(f)`` and iteration over the names work, and handles are hashable.

    Args:
        filename: path of the file.
        framework: ``"pt"`` (or ``"torch"``). For other frameworks the handle is safetensors' own.
        device: the CPU, or an accelerator as for ``safetensors_weights_iterator``.
        backend: ``"mmap"``: tensors are copy-on-write views of the mapped file. ``"pread"``: private memory. On an
            accelerator memory is always private. Either way what is written to a tensor shows in no other tensor,
            nor in one that is got later.
        cache: a folder with copies of what servers have, as ``safetensors_weights_iterator`` makes them. If there is
            one of this file, that is opened. A handle makes none: it does not read the file whole.

    Raises:
        FileNotFoundError: the file is missing (other errors of ``open()`` likewise).
        HeaderError: the file breaks a rule of the format; the subclass names the rule.
        OptionError: (``ValueError``, ``SafetensorError`` and ``RuntimeError``) a device that torch cannot use here, or
            no such backend.
    """

    def __new__(cls, *arguments: Any, **options: Any) -> Any:
        framework = arguments[1] if len(arguments) > 1 else options.get("framework", "pt")
        if cls is safe_open and framework not in TORCH_NAMES:
            if is_address(arguments[0] if arguments else options.get("filename")):
                raise ValueError(f"framework {framework!r}: what a server has is read as torch's tensors only ('pt')")
            if arguments:
                return safetensors_open(as_text(arguments[0]), *arguments[1:], **options)
            if "filename" in options:
                options["filename"] = as_text(options["filename"])
            return safetensors_open(**options)
        return super().__new__(cls)

    def __init__(
        self,
        filename: Path,
        framework: str = "pt",
        device: devices.Device = "cpu",
        *,
        backend: Backend = "mmap",
        cache: Path | None = None,
    ) -> None:
        if framework not in TORCH_NAMES:
            raise ValueError(f"framework {framework!r}: a class that is derived from safe_open gives torch's tensors")
        self._device = device_of(device, backend)
        self._backend = backend
        self._on_cpu = self._device.type == "cpu"
        self._maps = backend == "mmap"
        folder = require_cache(cache)
        copies = cache_of(folder, path_list(filename), fill=False) if folder is not None else None
        self._reader: _C.TensorReader | None = _C.TensorReader(open_files([filename], copies)[0])
        self._names: list[str] | None = None

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the file. Tensors, slices and prefetches that came of it stay usable."""
        self._reader = None

    def _opened(self) -> _C.TensorReader:
        reader = self._reader
        if reader is None:
            raise WeightLoadError("File is closed")
        return reader

    def keys(self) -> list[str]:
        """The tensors' names, sorted."""
        return sorted(self.offset_keys())

    def offset_keys(self) -> list[str]:
        """The tensors' names in the order in which they lie in the file, which is the fastest to read them in."""
        reader = self._opened()
        if self._names is None:
            self._names = reader.file.names()
        return list(self._names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._opened().file)

    def __bool__(self) -> bool:
        """True, whatever is in the file."""
        return True

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._opened().find(name) is not None

    def metadata(self) -> dict[str, str] | None:
        """The header's free-form metadata; None where it has none."""
        return self._opened().file.metadata

    def get_tensor_meta(self, name: str) -> TensorMeta:
        """A tensor's entry in the header, without reading the tensor.

        Raises:
            TensorError: there is no such tensor.
        """
        reader = self._opened()
        dtype, shape, begin, end = reader.info(find(reader, name))
        start = reader.file.data_begin
        return TensorMeta(dtype, shape, (begin - start, end - start))

    def get_tensor(self, name: str) -> torch.Tensor:
        """A whole tensor on the handle's device, usable on the current stream.

        Raises:
            TensorError: there is no such tensor, or torch lacks its dtype.
            ReadError, OutOfMemoryError: as ``safetensors_weights_iterator``.
        """
        reader = self._reader or self._opened()
        found = reader.get(name, self._maps) if self._on_cpu else reader.find(name)
        if isinstance(found, torch.Tensor):
            return found
        if found is None:
            raise no_such_tensor(reader, name)
        return fetch(reader, found, self._device, self._backend)

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor, by offset: as ``load_file``."""
        return load_all(self._opened().file, self._device, self._backend)

    def get_slice(self, name: str) -> TensorSlice:
        """A tensor to be indexed: ``f.get_slice(name)[10:20, ::2]`` reads no other rows than are needed.

        Of large tensors that are not in the page cache, or not mapped, a tuple of slices reads no other columns either
        where that saves half of it; halves of short rows are read with what lies between them.

        Raises:
            TensorError: there is no such tensor.
        """
        reader = self._opened()
        return TensorSlice(reader, find(reader, name), self._device, self._backend)

    def prefetch(
        self,
        plan: Mapping[str, slice | None] | None = None,
        *,
        device: devices.Device | None = None,
        threads: int | None = None,
    ) -> PrefetchLoader:
        """Start loading tensors in the background, all of them as far as memory goes, and return what hands them out.

        Args:
            plan: names of tensors, each with None (all of it) or a slice of step 1 of its first dimension, which must
                lie within the tensor. Default: every tensor.
            device: where to; default: the handle's device.
            threads: reading threads; default: the setting ``threads``.

        Raises:
            TensorError: a name that the file has not, rows that the tensor has not, or a dtype that torch has not.
            OptionError: as for the handle.
        """
        target = self._device if device is None else device_of(device)
        return start_prefetch(self._opened(), plan, target, self._backend, threads)


class TensorSlice:
    """A tensor of a file, read when it is indexed. Outlives its handle."""

    def __init__(self, reader: _C.TensorReader, number: int, device: torch.device, backend: str) -> None:
        self._reader, self._number, self._device = reader, number, device
        self._dtype, self._shape, self._begin, self._end = reader.info(number)
        self._mapped = backend == "mmap" and device.type == "cpu" and reader.can_map(number)

    def get_shape(self) -> list[int]:
        """The shape in the header, in elements; of F4 too, where torch counts pairs."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """The format's name of the dtype, such as ``"BF16"``."""
        return self._dtype

    @plainly
    def __getitem__(self, index: Any) -> torch.Tensor:
        """Index as torch does: of a mapped file a view where torch gives one, else memory of its own.

        Raises:
            IndexError, TypeError, ValueError: torch's own; IndexError also for the last dimension of F4, which has
                elements in the file and pairs in torch.
            ReadError, TensorError, OutOfMemoryError: as ``safe_open.get_tensor``.
        """
        if self._dtype in PACK and about_last_dimension(index, len(self._shape)):
            what = f"the last dimension of a packed dtype ({self._dtype}) cannot be indexed: torch counts pairs"
            raise IndexError(what)
        size = self._end - self._begin
        wide = row_bytes(self._dtype, self._shape, size)
        runs, within = plan_rows(index, torch_shape(self._dtype, tuple(self._shape)), wide)
        # Only where torch makes a view: a copy would touch pages that may be gone by now, which ends the process.
        lazy = self._mapped and is_basic(index)
        one = runs[0] if runs and len(runs) == 1 else None
        begin, end = (one[0] * wide, one[1] * wide) if one else (0, size)
        if lazy and ((runs and not one) or self._is_at_hand(begin, end)):
            view: torch.Tensor | None = self._reader.first_view(self._number, one, None if one else runs)
            if view is not None:
                return view[within if one else index]
        part = box_of(index, torch_shape(self._dtype, tuple(self._shape)))
        # Threads' work, and at least half of the rows' bytes need not be read.
        if part is not None and end - begin >= 2 * _C.TensorReader.LEAST_FOR_THREADS:
            wanted = math.prod(shape_of(part)) * size // math.prod(self._shape)
            if 0 < 2 * wanted <= end - begin:
                return fetch_part(self._reader, self._number, self._device, part)
        rows = fetch(self._reader, self._number, self._device, "mmap" if lazy else "pread", runs)
        picked = rows[within]
        of_a_mapping = lazy and end - begin >= _C.TensorReader.LEAST_FOR_THREADS and (one or not runs)
        if of_a_mapping or picked.untyped_storage().nbytes() == picked.nbytes:
            return picked
        return copied(picked, self._device)  # not for a few of the bytes to keep all of them

    def _is_at_hand(self, begin: int, end: int) -> bool:
        """Whether threads are of no use for these bytes of the tensor: few, or in the page cache."""
        few = end - begin < _C.TensorReader.LEAST_FOR_THREADS
        return few or self._reader.is_at_hand(self._begin + begin, self._begin + end)

"""Public exceptions, and the table from the core's errors to them.

All derive from ``safetensors.SafetensorError``, so ``except`` clauses written for safetensors keep working. A file
that cannot be opened raises what ``open()`` would raise: ``FileNotFoundError``, ``PermissionError``, ....
"""

from __future__ import annotations

import builtins
import os
from errno import ENOENT
from typing import TypeVar

import torch
from safetensors import SafetensorError

from weightload._base.printable import printable

__all__ = [
    "AddressError",
    "CacheError",
    "CheckpointError",
    "ChecksumError",
    "DeviceOutOfMemoryError",
    "DuplicateField",
    "DuplicateTensor",
    "GitLfsPointer",
    "GroupError",
    "GroupTypeError",
    "GroupValueError",
    "HeaderError",
    "HeaderTooLarge",
    "HeaderTooSmall",
    "HtmlPage",
    "InvalidHeader",
    "InvalidHeaderDeserialization",
    "InvalidHeaderLength",
    "InvalidMetadata",
    "InvalidOffset",
    "InvalidTensorEntry",
    "MetadataIncompleteBuffer",
    "MisalignedSlice",
    "NestingTooDeep",
    "NoSuchFileError",
    "NotARegularFile",
    "OptionError",
    "OutOfMemoryError",
    "RankDisagreementError",
    "RankLeftError",
    "ReadError",
    "StateDictError",
    "TensorError",
    "TensorInvalidInfo",
    "UnknownDtype",
    "ValidationOverflow",
    "WeightLoadError",
]


class WeightLoadError(SafetensorError):
    """Base of everything weightload raises about a checkpoint.

    Attributes, each ``None`` where it is not known or does not apply:
        filename: the file.
        tensor: the tensor's name.
        offset: bytes from the start of the file.
        errno: the operating system's error number.
        rank: whose error it is, counted in the group that shared the load; every rank of it raises the same.
    """

    filename: str | None = None
    tensor: str | None = None
    offset: int | None = None
    errno: int | None = None
    rank: int | None = None


class CheckpointError(WeightLoadError):
    """The files of a checkpoint do not fit together: a bad index, missing shards, an ambiguous directory."""


class ChecksumError(WeightLoadError):
    """A file has another digest than it should have: ``verify=``. What was loaded of it is not to be used."""


class HeaderError(WeightLoadError):
    """A file breaks a rule of the safetensors format. Its subclasses name the rules."""


class StateDictError(WeightLoadError, RuntimeError):
    """A checkpoint does not fit what it is loaded into. Nothing was loaded, unless the error says so: modules that
    take part in their own loading are called after the others were loaded."""


class TensorError(WeightLoadError):
    """One tensor cannot be handed out: torch lacks its dtype or cannot hold its shape."""


class ReadError(WeightLoadError, OSError):
    """Bytes could not be read. ``errno`` is the system's; it is ``None`` when the file ended early."""


class CacheError(WeightLoadError, OSError):
    """``cache=``: a copy of what a server has could not be written, or read. ``filename`` is the copy's, in the folder;
    ``errno`` is the system's."""


class OutOfMemoryError(WeightLoadError, MemoryError):
    """Memory for a tensor could not be had."""


class DeviceOutOfMemoryError(OutOfMemoryError, torch.OutOfMemoryError):
    """An accelerator's memory for a tensor could not be had."""


class OptionError(WeightLoadError, ValueError, RuntimeError):
    """A function that safetensors has, too, was given a device or a backend that it does not take.

    safetensors raises a ``SafetensorError`` or, where it is torch that refuses a device, a ``RuntimeError``; so that
    callers who look for either find it.
    """


class AddressError(WeightLoadError, ValueError):
    """An address that nothing can be asked of: without a bucket, a host or an account, say."""


class GroupError(WeightLoadError):
    """The ranks of a group could not share a load: one died, stopped or never called, or the network failed."""


class RankDisagreementError(GroupError):
    """The ranks of a group were about to load different things. Nothing was loaded."""


class RankLeftError(GroupError):
    """Another rank of the group left the load before its end. ``rank`` says which."""


class GroupValueError(GroupError, ValueError):
    """A rank of the group was given an argument of the wrong value, or what picks its tensors said so."""


class GroupTypeError(GroupError, TypeError):
    """A rank of the group was given an argument of the wrong type, or what picks its tensors said so."""


class HeaderTooSmall(HeaderError):
    """The file is shorter than the 8 bytes of its header's length."""


class HeaderTooLarge(HeaderError):
    """The header claims more than 100,000,000 bytes."""


class InvalidHeaderLength(HeaderError):
    """The header claims more bytes than the file has."""


class InvalidHeader(HeaderError):
    """The header is not UTF-8."""


class InvalidHeaderDeserialization(HeaderError):
    """The header is not JSON, or not a map."""


class InvalidTensorEntry(HeaderError):
    """A tensor's entry lacks a field, or has one of the wrong type."""


class InvalidMetadata(HeaderError):
    """``__metadata__`` is not a map of strings to strings."""


class UnknownDtype(HeaderError):
    """A dtype that is none of the 22 of safetensors 0.8."""


class DuplicateField(HeaderError):
    """A field occurs twice."""


class DuplicateTensor(HeaderError):
    """A tensor's name occurs twice, in one file or in two files of one checkpoint."""


class NestingTooDeep(HeaderError):
    """More than 127 levels of JSON."""


class InvalidOffset(HeaderError):
    """A tensor's bytes overlap others, leave a gap, or end before they begin."""


class TensorInvalidInfo(HeaderError):
    """A tensor's dtype and shape call for another number of bytes than its offsets give."""


class ValidationOverflow(HeaderError):
    """A tensor's size does not fit 64 bits."""


class MisalignedSlice(HeaderError):
    """A tensor of a packed dtype ends inside a byte."""


class MetadataIncompleteBuffer(HeaderError):
    """The file has more or fewer bytes than its tensors."""


class NotARegularFile(HeaderError):
    """A directory, device, FIFO or socket."""


class GitLfsPointer(HeaderError):
    """A Git LFS pointer in place of the file; `git lfs pull` fetches it."""


class HtmlPage(HeaderError):
    """A web page, as a failed download leaves it, in place of the file."""


class NoSuchFileError(FileNotFoundError):
    """``FileNotFoundError`` with the words of safetensors', which callers match on."""

    def __str__(self) -> str:
        if self.filename is None:  # made anew of its text alone, as DataLoader does of what a worker raised
            return super().__str__()
        return f"{self.strerror}: {printable(os.fsdecode(self.filename))}"


Located = TypeVar("Located", bound=WeightLoadError)


def located(error: Located, filename: str | None, tensor: str | None = None) -> Located:
    """The error with its place. Not done where it is raised: an error that is a variable of a frame that its traceback
    keeps would keep that frame's files open."""
    error.filename, error.tensor = filename, tensor
    return error


_RULES: dict[str, type[HeaderError]] = {rule.__name__: rule for rule in HeaderError.__subclasses__()}
_KINDS: dict[str, type[WeightLoadError]] = {
    "header": HeaderError,
    "tensor": TensorError,
    "read": ReadError,
    "memory": OutOfMemoryError,
    "device_memory": DeviceOutOfMemoryError,
    "group": GroupError,
    "left": RankLeftError,
    "checksum": ChecksumError,
    "usage": WeightLoadError,
}


def _os_error(errno: int, filename: str | None, rank: int | None) -> OSError:
    """OSError picks the subclass that belongs to the number."""
    where = "" if rank is None else f" (on rank {rank})"
    kind = NoSuchFileError if errno == ENOENT else OSError
    error = kind(errno, os.strerror(errno) + where, filename)
    error.rank = rank  # type: ignore[attr-defined]
    return error


def from_core(
    kind: str, rule: str, message: str, filename: str, tensor: str, offset: int | None, errno: int, rank: int | None
) -> BaseException:
    """Make the exception for an error of the C++ core (called by its bindings)."""
    if kind == "open":
        return _os_error(errno, filename, rank)
    error = _RULES.get(rule, _KINDS[kind])(message)
    error.filename = filename or None
    error.tensor = tensor or None
    error.offset = offset
    error.errno = errno or None
    error.rank = rank
    return error


def from_rank(
    rank: int,
    *,
    load: str,
    type: str,
    message: str,
    filename: str | None,
    tensor: str | None,
    offset: int | None,
    errno: int | None,
    when: str,
) -> BaseException:
    """Make the exception for an error that a rank told the others of before a load, or after it."""
    known = globals().get(type, getattr(builtins, type, None))
    system = isinstance(known, builtins.type) and issubclass(known, OSError) and known is not ReadError
    if errno is not None and system:
        return _os_error(errno, filename, rank)
    if isinstance(known, builtins.type) and issubclass(known, WeightLoadError):
        error = known(f"on rank {rank}: {message}")
    else:
        of_rank = {"TypeError": GroupTypeError, "ValueError": GroupValueError}.get(type, GroupError)
        failed = f"failed {when}".rstrip()
        error = of_rank(f"{load}: rank {rank} {failed}: {type}: {message}")
    error.filename, error.tensor, error.offset, error.errno, error.rank = filename, tensor, offset, errno, rank
    return error

"""Runs one loader in a process of its own, and checks what it yields.

    python benchmarks/loader_worker.py NAME --device cuda:0 FILE ...    loads once and checks: for profilers, sanitizers

In a process of its own a crash or a hang ends only that loader, none inherits another's pinned memory or open files,
and two versions of one package can be compared. Both ends of the pipe between the processes are in this file.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from peers import NotAvailableError, Peer, Weights, environment, find, missing

SAMPLE = 50
PIECE = 4 << 20
END = 64 << 10


def a_device(text: str) -> torch.device:
    """A device with its number, which tensors carry too."""
    device = torch.device(text)
    return device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0)


class Checkpoint:
    """The CPU tensors that a load is held against, bit for bit: of a sample of names, and all names."""

    def __init__(self, files: list[str]) -> None:
        from safetensors import safe_open

        self.file_of: dict[str, str] = {}
        sizes: list[tuple[int, str]] = []
        for file in files:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118  (the handle is no dict)
                    self.file_of[name] = file
                    sizes.append((opened.get_tensor(name).nbytes, name))  # a view: reads nothing
        names = list(self.file_of)
        sizes.sort()
        picked = [sizes[-1][1], sizes[0][1], names[-1], names[0], *names[:: max(1, len(names) // SAMPLE)]]
        self.sample = set(list(dict.fromkeys(picked))[:SAMPLE])

    def differs(self, tensors: dict[str, torch.Tensor], device: torch.device, whole: bool) -> str | None:
        """What is wrong with tensors of the sample; not ``whole``: their two ends are compared."""
        from safetensors import safe_open

        for file in dict.fromkeys(self.file_of.values()):
            names = [name for name in tensors if name in self.sample and self.file_of[name] == file]
            if not names:
                continue
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in names:
                    wrong = _difference(tensors[name], opened.get_tensor(name), device, whole)
                    if wrong:
                        return f"{name}: {wrong}"
        return None


def _difference(tensor: torch.Tensor, expected: torch.Tensor, device: torch.device, whole: bool) -> str | None:
    if (tensor.shape, tensor.dtype, tensor.device) != (expected.shape, expected.dtype, device):
        return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    have, want = (t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, expected))
    step = PIECE if whole else END
    for at in range(0, have.numel(), step) if whole else (0, max(0, have.numel() - END)):
        if not torch.equal(have[at : at + step], want[at : at + step].to(device)):
            return f"bytes differ, from {at} on"
    return None


@contextlib.contextmanager
def memory_watch(device: torch.device) -> Iterator[list[int]]:
    """The most memory in use on the device, by the driver's count: sees what torch's allocator does not give out."""
    peak = [0]
    if device.type != "cuda":
        yield peak
        return
    done = threading.Event()

    def used() -> int:
        free, total = torch.cuda.mem_get_info(device)
        return total - free

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], used() - before)

    before = used()
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()


class Runner:
    """Loads a checkpoint with one loader, as often as asked."""

    def __init__(self, peer: Peer, files: list[str], device: torch.device) -> None:
        self.peer, self.files, self.device = peer, files, device
        self.checkpoint = Checkpoint(files)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        torch.zeros(1, device=device)  # the first use of a device sets it up

    def version(self) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(self.peer.package) if self.peer.package else None
        return None

    def load(self, thorough: bool) -> dict[str, Any]:
        """One load. The clock runs from the call until the device has every tensor; all are kept until then.

        Afterwards the two ends of a sample of tensors are compared. ``thorough`` is for a load whose time does not
        count: each tensor of the sample is compared as a whole, both as it is yielded and at the end.
        """
        on_cuda = self.device.type == "cuda"
        before = 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        with memory_watch(self.device) if thorough else contextlib.nullcontext([0]) as driver_peak:
            begin = time.perf_counter()
            tensors, wrong = self._drain(self.peer.load(self.files, self.device), thorough)
            if self.device.type != "cpu":
                torch.accelerator.synchronize(self.device)
            seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated(self.device) - before if on_cuda else None
        if wrong is None and set(tensors) != set(self.checkpoint.file_of):
            count = len(set(tensors) ^ set(self.checkpoint.file_of))
            wrong = f"{count} names are missing or are not in the files"
        wrong = wrong or self.checkpoint.differs(tensors, self.device, thorough)
        tensors.clear()
        self._release()
        return {
            "seconds": seconds,
            "wrong": wrong,
            "peak_bytes": peak,
            "driver_peak_bytes": driver_peak[0] if thorough and on_cuda else None,
        }

    def _drain(self, weights: Weights, thorough: bool) -> tuple[dict[str, torch.Tensor], str | None]:
        tensors: dict[str, torch.Tensor] = {}
        wrong = None
        for name, tensor in weights:
            if thorough and name in self.checkpoint.sample and wrong is None:
                wrong = self.checkpoint.differs({name: tensor}, self.device, whole=True)
                wrong = wrong and f"as it was yielded: {wrong}"
            tensors[name] = tensor
        return tensors, wrong

    def _release(self) -> None:
        """The device's memory is given back: the next loader, in its own process, starts from the same."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def serve(name: str, files: list[str], device: torch.device) -> None:
    """Answer requests on stdin, one JSON line each; whatever the loader prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        runner = Runner(find(name), files, device)
        answer({"version": runner.version()})
        for line in sys.stdin:
            answer(runner.load(**json.loads(line)))
    except NotAvailableError as error:
        answer({"reason": str(error)})
    except BaseException as error:
        answer({"reason": f"{type(error).__name__}: {str(error)[:300]}"})
        raise


class FailedError(Exception):
    """A loader cannot go on; the text says why."""


class Worker:
    """The other end: a process that runs one loader."""

    def __init__(self, name: str, files: list[str], device: torch.device, log: IO[bytes], limit: float) -> None:
        peer = find(name)
        reason = missing(peer, device)
        if reason:
            raise FailedError(reason)
        self.limit = limit
        command = [sys.executable, "-X", "faulthandler", str(Path(__file__)), name, "--serve", "--device", str(device)]
        self._process = subprocess.Popen(
            [*command, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(peer)
        )

    def version(self) -> str | None:
        """Waits until it is ready."""
        return self._answer()["version"]  # type: ignore[no-any-return]

    def load(self, thorough: bool = False) -> dict[str, Any]:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"thorough": thorough}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self.limit)[0]:
            self.close()
            raise FailedError(f"no answer within {self.limit:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
            raise FailedError(f"its process ended {ended}")
        answer: dict[str, Any] = json.loads(line)
        if "reason" in answer:
            self.close()
            raise FailedError(answer["reason"])
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", help="a loader of peers.py, or FILE.py:FUNCTION")
    parser.add_argument("files", nargs="+")
    parser.add_argument("--device", type=a_device, default="cuda:0")
    parser.add_argument("--serve", action="store_true", help="answer requests of the comparison")
    options = parser.parse_args()
    if options.serve:
        serve(options.name, options.files, options.device)
        return
    done = Runner(find(options.name), options.files, options.device).load(thorough=True)
    print(json.dumps(done))
    if done["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

"""Runs one loader in a process of its own, and checks what it yields.

    python benchmarks/loaders/worker.py NAME --device cuda:0 FILE ...   loads once and checks: for profilers, sanitizers

In a process of its own a crash or a hang ends only that loader, none inherits another's pinned memory or open files,
and two versions of one package can be compared. Both ends of the pipe between the processes are in this file.

What is timed: from the call until every tensor is held in a dict and has arrived. On an accelerator that is when the
device is idle; for views of mapped files when one byte of each of their pages has been read.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
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

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/, also when this is run by itself

from checkpoints.expected import Checkpoint
from harness import tensor_memory
from harness.proc import memory_fields, process_memory

from loaders.into_loads import module_of, parameters
from loaders.peer_loads import NotAvailableError, Weights
from loaders.peers import INTO, MAPPED, PRIVATE, Peer, environment, find, kind_of, missing

SAMPLING_S = 0.002
LONGEST_START_S = 180.0


def a_device(text: str) -> torch.device:
    """A device with its number, which tensors carry too."""
    device = torch.device(text)
    return device if device.type == "cpu" or device.index is not None else torch.device(device.type, 0)


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
        self.kind = kind_of(peer, device)
        begin = time.perf_counter()
        importlib.import_module(peer.module)
        self.import_s = time.perf_counter() - begin  # after torch
        self.checkpoint = Checkpoint(files)
        if device.type != "cpu":
            torch.accelerator.set_device_index(device)
        torch.zeros(1, device=device)  # the first use of a device sets it up

    def version(self) -> str | None:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(self.peer.package) if self.peer.package else None
        return None

    def load(self, thorough: bool, files: list[str] | None = None) -> dict[str, Any]:
        """One load, of other files with the same tensors where ``files`` says so.

        Afterwards it is compared as ``expected.TIMED`` says. ``thorough`` is for a load whose time does not count: that
        is compared as ``expected.UNTIMED`` says, and where its tensors' bytes are is looked at.
        """
        files = files or self.files
        on_cuda = self.device.type == "cuda"
        before = 0
        if on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
        module = module_of(files) if self.kind == INTO else None
        cpu_begin, begin = time.process_time(), time.perf_counter()
        weights, tensors, wrong = self._load(files, module, thorough)
        seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        touch_s = 0.0
        if self.kind == MAPPED:
            spans = tensor_memory.spans_of(tensors.values())  # not on the clock: no load's own work
            cpu_begin, begin = time.process_time(), time.perf_counter()
            tensor_memory.touch(spans)
            touch_s = time.perf_counter() - begin
            cpu_s += time.process_time() - cpu_begin
        if module is not None:
            tensors = parameters(module)
        peak = torch.cuda.max_memory_allocated(self.device) - before if on_cuda else None
        answer = {
            "seconds": seconds + touch_s,
            "touch_s": touch_s,
            "cpu_s": cpu_s,
            "wrong": wrong or self._wrong(tensors, thorough),
            "peak_bytes": peak,
            "stats": _stats(weights),
        }
        if (
            thorough
            and self.kind == PRIVATE
            and not answer["wrong"]
            and tensor_memory.mapped_bytes(tensors.values(), files)
        ):
            raise NotAvailableError("its tensors are views of the files, not in memory of their own")
        tensors.clear()
        module = weights = None
        self._release()
        return answer

    def watched(self) -> dict[str, Any]:
        """Load once for those that watch memory: nothing is timed, touched or compared, and all else is there before.

        When it began and ended is told by the clock that all processes share.
        """
        module = module_of(self.files) if self.kind == INTO else None
        gc.collect()
        fields = memory_fields(self.files)
        with memory_watch(self.device) as driver_peak:
            before, began = process_memory(os.getpid(), fields), time.monotonic()
            held = self._load(self.files, module, thorough=False)
            ended, after = time.monotonic(), process_memory(os.getpid(), fields)
        del held, module
        self._release()
        return {
            "began": began,
            "ended": ended,
            "before_bytes": before,
            "after_bytes": after,
            "driver_peak_bytes": driver_peak[0] if self.device.type == "cuda" else None,
        }

    def _load(
        self, files: list[str], module: torch.nn.Module | None, thorough: bool
    ) -> tuple[Weights | None, dict[str, torch.Tensor], str | None]:
        """The timed load; a module's tensors are its own."""
        weights, tensors, wrong = None, dict[str, torch.Tensor](), None
        if module is not None and self.peer.into is not None:
            self.peer.into(files, module)
        else:
            assert self.peer.load is not None
            weights = self.peer.load(files, self.device)
            tensors, wrong = self._drain(weights, thorough)
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return weights, tensors, wrong

    def _wrong(self, tensors: dict[str, torch.Tensor], thorough: bool) -> str | None:
        """Describes wrong tensors of a load, all held."""
        if set(tensors) != set(self.checkpoint.file_of):
            count = len(set(tensors) ^ set(self.checkpoint.file_of))
            return f"{count} names are missing or are not in the files"
        picked = tensors if thorough else {name: tensors[name] for name in self.checkpoint.sample}
        wrong = self.checkpoint.differs(picked, self.device, thorough)
        if not wrong and thorough and (pair := tensor_memory.overlapping(tensors)):
            return f"{pair[0]} and {pair[1]} share memory"
        return wrong

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
        self.checkpoint.release()
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
        answer({"version": runner.version(), "import_s": runner.import_s})
        for line in sys.stdin:
            request = json.loads(line)
            answer(runner.watched() if request is None else runner.load(**request))
    except NotAvailableError as error:
        answer({"reason": str(error)})
    except BaseException as error:
        answer({"reason": f"{type(error).__name__}: {str(error)[:300]}"})
        raise


def _stats(weights: Weights | None) -> dict[str, Any] | None:
    """A loader's own figures: an iterator's ``stats()``, where it has one."""
    stats = getattr(weights, "stats", None)
    found: Any = stats() if callable(stats) else None
    return found.as_dict() if hasattr(found, "as_dict") else None


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
        self._fields = memory_fields(files)
        command = [sys.executable, "-X", "faulthandler", str(Path(__file__)), name, "--serve", "--device", str(device)]
        self._process = subprocess.Popen(
            [*command, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment(peer)
        )

    def ready(self) -> dict[str, Any]:
        """Waits until it is ready; the answer is the loader's version and the seconds that importing it took."""
        return self._answer(limit=LONGEST_START_S)

    def load(self, thorough: bool = False, files: list[str] | None = None) -> dict[str, Any]:
        self._ask({"thorough": thorough, "files": files})
        return self._answer()

    def watched(self) -> dict[str, Any]:
        """One load of which only memory is of interest.

        That is the most private memory of the process while it loaded, beyond what it had when that began, and what of
        it the process still has when the tensors are gone: memory that the next load may use again.
        """
        before = self._memory()
        self._ask(None)
        # From here, and not by a thread there, which would have to wait for the GIL.
        samples: list[tuple[float, int, float]] = []
        answer = self._answer(samples)
        within = [used for begin, used, end in samples if answer["began"] <= begin and end <= answer["ended"]]
        return {
            "private_peak_bytes": max(answer["before_bytes"], answer["after_bytes"], *within) - answer["before_bytes"],
            "kept_bytes": max(0, self._memory() - before),
            "driver_peak_bytes": answer["driver_peak_bytes"],
        }

    def _ask(self, request: dict[str, Any] | None) -> None:
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the answer tells why

    def _memory(self) -> int:
        return process_memory(self._process.pid, self._fields)

    def _answer(
        self, samples: list[tuple[float, int, float]] | None = None, limit: float | None = None
    ) -> dict[str, Any]:
        """The worker's next line; until then its memory is sampled, with the times just before and after."""
        assert self._process.stdout is not None
        limit = limit or self.limit
        deadline = time.monotonic() + limit
        while not select.select([self._process.stdout], [], [], limit if samples is None else SAMPLING_S)[0]:
            if time.monotonic() >= deadline:
                self.close()
                raise FailedError(f"no answer within {limit:.0f} s")
            if samples is not None:
                samples.append((time.monotonic(), self._memory(), time.monotonic()))
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
        """Ends the process; it may have ended before."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # what it never read
                if pipe:
                    pipe.close()


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

"""Shared loads over torch's ProcessGroupNCCL when a rank dies, stops or is late: real processes, the simulated NCCL.

Ranks that leave or cannot read are in test_simulated_group.py, which runs on it, too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from conftest import SEED
from support.ranks.simulated import BACKENDS, KINDS

STRATEGIES = ["broadcast", "striped"]
TIMEOUT_S = 10  # of the group; what torch's watchdog waits for before it ends the process
BEGIN = f"""
import datetime, os, select, signal, sys, threading, time
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
from pathlib import Path
import torch, torch.distributed as dist, weightload
from support.simulated import TUNED, raw, reference_of
from weightload import errors, settings
rank, size, store, backend, strategy = int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:6]
paths = [Path(path) for path in sys.argv[6:]]
limit = datetime.timedelta(seconds={TIMEOUT_S})
dist.init_process_group(backend, store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=limit)
def load(group=None):
    group = group or dist.group.WORLD
    return weightload.safetensors_weights_iterator(paths, device="cuda:0", strategy=strategy, group=group)
def whole(group=None):
    with settings.override(**TUNED):
        got = dict(load(group))
    for name, tensor in reference_of(*paths).items():
        assert torch.equal(raw(got[name]), raw(tensor)), name
"""


def start(script: str, size: int, backend: str, strategy: str, folder: Path, paths: list[Path], **more: str) -> list:
    text = BEGIN + textwrap.dedent(script)
    more["TORCH_NCCL_DUMP_ON_TIMEOUT"] = "0"  # which takes a minute
    environment = {**os.environ, **more, "LOCAL_WORLD_SIZE": str(size), "WEIGHTLOAD_SIMULATED_SEED": str(SEED)}
    store = folder / f"store.{time.monotonic_ns()}"
    processes = []
    for rank in range(size):
        command = [sys.executable, "-c", text, rank, size, store, backend, strategy, *paths]
        log = (folder / f"rank.{rank}").open("w+")
        processes.append(subprocess.Popen(list(map(str, command)), env=environment, stdout=log, stderr=log))
    return processes


def ended(processes: list, folder: Path, seconds: float) -> list[tuple[int, str]]:
    """The status of each, and what it said; all end in time."""
    deadline = time.monotonic() + seconds
    try:
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        said = [(folder / f"rank.{rank}").read_text()[-2000:] for rank in range(len(processes))]
        pytest.fail("ranks hang\n" + "\n---\n".join(said))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [(process.returncode, (folder / f"rank.{rank}").read_text()) for rank, process in enumerate(processes)]


def healthy(size: int, backend: str, strategy: str, folder: Path, paths: list[Path]) -> None:
    """A load of fresh ranks, as a launcher starts them after a failure."""
    for status, said in ended(start("whole()\nprint('whole')", size, backend, strategy, folder, paths), folder, 150):
        assert status == 0, said
        assert said.rstrip().endswith("whole")


@pytest.mark.parametrize(
    ("kind", "strategy", "size", "lost"),
    [
        ("both", "broadcast", 2, "hang"),
        ("both", "striped", 3, "error"),
        ("device", "broadcast", 3, "error"),
        ("device", "striped", 2, "hang"),
    ],
)
def test_a_rank_that_dies(tmp_path: Path, mixed: list[Path], kind: str, strategy: str, size: int, lost: str) -> None:
    """The others end: by an error of the load, or by torch's watchdog at the group's timeout. No wrong byte before."""
    script = """
    whole()
    reference, copies = reference_of(*paths), {}
    print("begun", flush=True)
    try:
        with settings.override(**TUNED):
            for number, (name, tensor) in enumerate(load()):
                if rank == size - 1 and number == 150:
                    os.kill(os.getpid(), signal.SIGKILL)
                copies[name] = tensor.cpu()
        print("all of it")
    except weightload.WeightLoadError as error:
        print("an error:", type(error).__name__, error)
    for name, tensor in copies.items():
        assert torch.equal(raw(tensor), raw(reference[name])), name
    print("right so far", flush=True)
    os._exit(0)
    """
    ranks = start(script, size, BACKENDS[kind], strategy, tmp_path, mixed, WEIGHTLOAD_SIMULATED_NCCL_LOST=lost)
    outcomes = ended(ranks, tmp_path, 150)
    assert outcomes[-1][0] == -signal.SIGKILL, outcomes[-1][1]
    for status, said in outcomes[:-1]:
        assert "begun" in said
        if status == 0:
            assert "an error:" in said, said
            assert "right so far" in said
        else:  # torch's watchdog ends a process whose communicator is broken
            assert status == -signal.SIGABRT, (status, said[-3000:])
            assert "AssertionError" not in said
    healthy(size, BACKENDS[kind], strategy, tmp_path, mixed)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_stops_for_a_while(tmp_path: Path, mixed: list[Path], kind: str, strategy: str) -> None:
    script = """
    with settings.override(**TUNED):
        got = {}
        for number, (name, tensor) in enumerate(load()):
            got[name] = tensor
            if rank == 1 and number == 150:
                print("stopped", flush=True)
                os.kill(os.getpid(), signal.SIGSTOP)
    for name, tensor in reference_of(*paths).items():
        assert torch.equal(raw(got[name]), raw(tensor)), name
    print("whole")
    """
    ranks = start(script, 2, BACKENDS[kind], strategy, tmp_path, mixed)
    deadline = time.monotonic() + 120
    while "stopped" not in (tmp_path / "rank.1").read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(2)  # of 10 that the group waits
    ranks[1].send_signal(signal.SIGCONT)
    for status, said in ended(ranks, tmp_path, 120):
        assert status == 0, said
        assert said.rstrip().endswith("whole")


# A rank's group is aborted while the rank waits for the others' records. The last rank stops, before its load or
# between two tensors; the others come to have issued a collective more, which is a gather of records, since nothing
# travels without one. A handler that has run twice since then says that they wait for it.
WHILE_IT_GATHERS = """
words = dist.FileStore(store + ".words", size)
group = dist.new_group(backend=backend)
whole(group)  # its communicator is made with the first collective, by all ranks
backend_of_it = group._get_backend(torch.device("cuda"))
issued = backend_of_it._get_sequence_number_for_group
last, interrupts = size - 1, threading.Semaphore(0)
signal.signal(signal.SIGUSR1, lambda *_: interrupts.release())
def abort(beyond):
    if rank != last:
        beyond, pid = map(int, words.get("stopped").split())
        died = os.pidfd_open(pid)
    while issued() == beyond:
        time.sleep(0.01)
    for _ in range(2):
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        interrupts.acquire()
    if rank != last and dies:
        select.select([died], [], [])
    backend_of_it.abort()
def stop():
    words.set("stopped", f"{issued()} {os.getpid()}")
    if dies:
        os.kill(os.getpid(), signal.SIGKILL)
    for other in range(last):
        words.get(f"ended.{other}")
thread = threading.Thread(target=lambda: abort(issued()))
if rank != last:
    thread.start()
reference, copies = reference_of(*paths), {}
def consume():
    for number, (name, tensor) in enumerate(load(group)):
        copies[name] = tensor.cpu()
        if rank == last and number == 150 and stage == "status":
            stop()
            thread.start()
try:
    with settings.override(**TUNED):
        if rank == last and stage == "agreement":
            stop()
            thread.start()
        consume()
    print("all of it")
except errors.GroupError as error:
    print("a group's error:", error)
thread.join()
words.set(f"ended.{rank}", "")
for name, tensor in copies.items():
    assert torch.equal(raw(tensor), raw(reference[name])), name
print("right so far", flush=True)
if not dies:
    whole(dist.new_group(backend=backend))
    print("whole", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dies", [False, True], ids=["abort", "death"])
@pytest.mark.parametrize("stage", ["agreement", "status"])
def test_an_abort_while_records_are_gathered(
    tmp_path: Path, mixed: list[Path], stage: str, dies: bool, strategy: str, size: int
) -> None:
    """The gather ends early, and what lies in its memory are no records of the others': an error, on every rank."""
    script = f"stage, dies = {stage!r}, {dies}" + WHILE_IT_GATHERS
    outcomes = ended(start(script, size, BACKENDS["device"], strategy, tmp_path, mixed), tmp_path, 150)
    for rank, (status, said) in enumerate(outcomes):
        if dies and rank == size - 1:
            assert status == -signal.SIGKILL, said
            continue
        assert status == 0, said
        assert "a group's error:" in said, said
        # The last rank's record never came; those of the others had reached it.
        assert rank == size - 1 or "the communicator was aborted before every rank's record had come" in said, said
        assert "right so far" in said
        assert dies or said.rstrip().endswith("whole")
    if dies:
        healthy(size, BACKENDS["device"], strategy, tmp_path, mixed)

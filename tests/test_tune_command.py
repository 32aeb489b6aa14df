"""weightload tune: real loads of a small checkpoint, and what it says of them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_tensors
from simulated_support import DEVICE

from weightload import _C, cli, settings, tune_storage
from weightload.cpus import usable_cpus
from weightload.tune_candidates import IN_FORCE, LEAST_AGAIN, Candidate, candidates
from weightload.tune_loads import Loads, checkpoint_of
from weightload.tune_storage import Storage, evict, storage_of, why_never_cold
from weightload.tune_verdict import MOST_CHANCE

# Small checkpoints are done with in a second or two; on a busy machine they may take longer.
PLENTY = 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    for number in (1, 2):
        tensors = [(f"{number}.{i}", "BF16", [500, 1000]) for i in range(4)] + [(f"{number}.odd", "F6_E2M3", [4])]
        write_tensors(folder / f"model-{number}-of-2.safetensors", tensors, seed=number)
    return folder


@pytest.fixture
def in_memory() -> Any:
    """A folder of a tmpfs."""
    if storage_of("/dev/shm").kind != "memory" or not os.access("/dev/shm", os.W_OK):
        pytest.skip("no tmpfs")
    folder = Path(f"/dev/shm/weightload-tune-{os.getpid()}")
    folder.mkdir()
    yield folder
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def tuned(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main(["tune", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def digests(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (hash(file.read_bytes()), file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_in_words(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(checkpoint)
    out = tuned(capsys, checkpoint, "--seconds", PLENTY)
    assert "8 tensors, 8.00 MB of 8.00 MB, in 2 file(s)" in out  # torch has no F6
    assert f"; {usable_cpus()} CPUs may be used" in out
    assert str(storage_of(str(checkpoint))) in out
    assert "in force:    the defaults" in out
    assert "window_bytes 64 MiB" in out
    assert "GB/s" in out
    assert "(median +- half the range" in out
    assert "The settings in force are right" in out or "export WEIGHTLOAD_" in out
    assert digests(checkpoint) == before


def test_in_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(tuned(capsys, checkpoint, "--seconds", PLENTY, "--json"))
    assert set(found) == {
        "device", "cpus", "storage", "files", "tensors", "sample_bytes", "checkpoint_bytes", "seconds_allowed",
        "seconds_taken", "why_not_cold", "in_force", "measured", "measured_again", "left_out", "compared",
        "ahead", "undecided", "recommended", "shell",
    }  # fmt: skip
    assert found["device"] == "cpu"
    assert found["tensors"] == 8
    assert found["sample_bytes"] == found["checkpoint_bytes"] == 8_000_000
    assert found["storage"]["file_system"] == storage_of(str(checkpoint)).file_system
    assert found["in_force"]["threads"] == {"value": 0, "from": "default"}
    states = {run["page_cache"] for run in found["measured"]}
    assert states == ({"warm"} if found["why_not_cold"] else {"cold", "warm"})
    for run in found["measured"]:
        assert run["seconds"]
        assert all(seconds > 0 for seconds in run["seconds"])
        assert len(run["settings"]) <= 1
        assert run["gigabytes_per_second"] > 0
    assert any(not run["settings"] for run in found["measured"])
    assert len(found["shell"]) == len(found["recommended"])


def test_files_in_memory_are_loaded_warm_only(in_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(in_memory / "m.safetensors", [("w", "U8", [3_000_000])])
    out = tuned(capsys, in_memory, "--seconds", PLENTY)
    assert "tmpfs" in out
    assert "no cold loads: the files lie in memory" in out
    assert "cold, GB/s" not in out
    assert "warm, GB/s" in out


def test_the_environment_is_what_is_compared_with(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLOAD_TASK_BYTES", "1048576")
    out = tuned(capsys, checkpoint, "--seconds", PLENTY)
    assert "in force:    task_bytes 1 MiB (WEIGHTLOAD_TASK_BYTES); else the defaults" in out
    assert "task_bytes 8 MiB" in out  # the default is a candidate
    assert "task_bytes 256 KiB" in out


def test_a_change_back_to_the_default_unsets_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    from weightload.tune_report import _export

    assert _export("threads", 0) == "unset WEIGHTLOAD_THREADS"
    assert _export("threads", 8) == "export WEIGHTLOAD_THREADS=8"
    assert _export("read", "direct") == "export WEIGHTLOAD_READ=direct"


def test_exit_codes(
    tmp_path: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["tune", str(tmp_path / "none")]) == 3
    (tmp_path / "bad.safetensors").write_bytes(b"1234567")
    assert cli.main(["tune", str(tmp_path / "bad.safetensors")]) == 1
    write_tensors(tmp_path / "empty.safetensors", [("w", "U8", [0])])
    assert cli.main(["tune", str(tmp_path / "empty.safetensors")]) == 1
    assert "no tensor to load" in capsys.readouterr().err
    assert cli.main(["tune", str(checkpoint), "--device", "nonsense"]) == 2
    assert cli.main(["tune", str(checkpoint), "--device", "xpu:0"]) == 2
    for seconds in ("0", "-1", "nan", "soon"):
        with pytest.raises(SystemExit) as usage:
            cli.main(["tune", str(checkpoint), "--seconds", seconds])
        assert usage.value.code == 2
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    assert cli.main(["tune", str(checkpoint)]) == 2


def test_help_says_what_happens_to_the_page_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "the files are put out of the page cache before each load" in out
    assert f"at least {LEAST_AGAIN} loads of each, by more than chance would bring about in 1 of 200" in out
    assert MOST_CHANCE == 1 / 200
    assert "exit codes" in out


def test_ctrl_c_ends_it(checkpoint: Path) -> None:
    script = """
        import sys
        from weightload import _C, cli
        _C.arm_fault("delay", first=30, count=1 << 30, delay_ms=200)  # of reads of 4 KiB: hours
        print(flush=True)
        sys.exit(cli.main(sys.argv[1:]))
    """
    environment = {**os.environ, "WEIGHTLOAD_TASK_BYTES": "4096", "WEIGHTLOAD_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script), "tune", str(checkpoint), "--seconds", "3000"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        process.stdout.readline()
        time.sleep(0.5)  # wherever it is by then
        process.send_signal(signal.SIGINT)
        try:
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (130, "", "weightload: stopped\n")


def test_a_load_is_cut_off(checkpoint: Path, arm: Callable[..., None]) -> None:
    """Reads that take their time: the load ends at its limit, and nothing is left of it."""
    found = checkpoint_of(sorted(str(file) for file in checkpoint.iterdir()))
    loads = Loads(found.sample(found.bytes), torch.device("cpu"))
    with settings.override(threads=1, task_bytes=4096):
        evict(loads.sample.files)
        arm("delay", first=2, count=1 << 30, delay_ms=20)
        begin = time.monotonic()
        assert loads.seconds(IN_FORCE, "warm", 0.3) is None
    assert time.monotonic() - begin < 20  # of 40 s
    _C.disarm_fault()
    took = loads.seconds(Candidate((("threads", 1),)), "warm", 60)
    assert took is not None
    assert 0 < took < 60


def test_loads_have_the_candidates_settings(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightload import tune_loads

    seen = []
    real = tune_loads.safetensors_weights_iterator

    def spy(*arguments: Any, **options: Any) -> Any:
        seen.extend([settings.current()] if options["names"] else [])
        return real(*arguments, **options)

    monkeypatch.setattr(tune_loads, "safetensors_weights_iterator", spy)
    found = checkpoint_of(sorted(str(file) for file in checkpoint.iterdir()))
    loads = Loads(found.sample(2_500_000), torch.device("cpu"))
    assert len(loads.sample.names) == 2
    loads.seconds(Candidate((("threads", 3), ("task_bytes", 65536))), "warm", 60)
    loads.seconds(IN_FORCE, "warm", 60)
    assert [(one.threads, one.task_bytes) for one in seen] == [(3, 65536), (0, 8 << 20)]


def lazily_freed() -> int:
    """KB that this process has lent to the kernel, private memory that is kept for later loads among them."""
    rollup = Path("/proc/self/smaps_rollup")
    lines = rollup.read_text().splitlines() if rollup.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("LazyFree:")]
    if not found:
        pytest.skip("the kernel does not tell what is lent to it")
    return found[0]


@pytest.mark.parametrize("state", ["cold", "warm"])
def test_every_timed_load_begins_without_memory_of_earlier_ones(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weightload import tune_loads

    begun = []
    real = tune_loads.safetensors_weights_iterator

    def spy(*arguments: Any, **options: Any) -> Any:
        begun.extend([(settings.current().spare_bytes, lazily_freed())] if options["names"] else [])
        return real(*arguments, **options)

    monkeypatch.setattr(tune_loads, "safetensors_weights_iterator", spy)
    monkeypatch.setattr(tune_loads, "evict", lambda _: None)
    # Behind an odd byte: private memory, as it cannot be mapped.
    path = write_tensors(tmp_path / "m.safetensors", [("a", "U8", [1]), ("b", "F32", [16 << 20])])
    found = checkpoint_of([str(path)])
    loads = Loads(found.sample(found.bytes), torch.device("cpu"))
    with settings.override(spare_bytes=1 << 30):
        for candidate in (IN_FORCE, Candidate((("threads", 1),)), IN_FORCE):
            assert loads.seconds(candidate, state, 60)
            assert lazily_freed() > 0  # or this test shows nothing
    assert begun == [(1 << 30, 0)] * 3
    loads._give_up_spare_memory()
    assert lazily_freed() == 0


def test_no_candidate_keeps_another_amount_of_memory() -> None:
    for to_accelerator in (False, True):
        found = candidates(settings.Settings(), to_accelerator)
        assert "spare_bytes" not in {name for one in found for name, _ in one.changes}


def test_evicting_is_verified(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = sorted(str(file) for file in checkpoint.iterdir())
    naps: list[float] = []
    monkeypatch.setattr(_C, "resident_bytes", lambda _: 400_000)
    assert (
        evict(files, naps.append)
        == "10% of the files stays in the page cache, written lately or mapped by another process"
    )
    assert len(naps) == tune_storage.TRIES - 1
    answers = iter([4_000_000, 0, 0, 0])
    monkeypatch.setattr(_C, "resident_bytes", lambda _: next(answers))
    assert evict(files, naps.append) is None
    monkeypatch.setattr(_C, "resident_bytes", lambda _: None)
    assert "owner" in (evict(files, naps.append) or "")


def test_evicted_files_are_out(checkpoint: Path) -> None:
    files = sorted(str(file) for file in checkpoint.iterdir())
    if storage_of(files[0]).file_system not in ("ext4", "xfs", "btrfs"):
        pytest.skip("not on a local disk")
    assert why_never_cold(files) is None
    assert sum(_C.resident_bytes(os.fsencode(file)) or 0 for file in files) == 0


def test_storage_is_the_nearest_mount_s(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "1 0 8:1 / / rw - ext4 /dev/vda rw\n"
        "2 1 0:5 / /data rw,relatime shared:1 - nfs4 server:/export rw\n"
        "3 1 0:6 / /data/with\\040space rw - fuse.sshfs me@there: rw\n"
        "4 1 0:7 / /dat rw - tmpfs tmpfs rw\n"
        "5 1 0:8 / /twice rw - ext4 /dev/a rw\n"
        "6 5 0:9 / /twice rw - xfs /dev/b rw\n"
        "7 1 0:10 / /container rw - overlay overlay rw,lowerdir=/a\n"
        "nonsense\n"
    )
    for path, storage in (
        ("/data/m.safetensors", Storage("nfs4", "server:/export", "shared")),
        ("/data/with space/m", Storage("fuse.sshfs", "me@there:", "shared")),
        ("/dat/m", Storage("tmpfs", "tmpfs", "memory")),
        ("/database/m", Storage("ext4", "/dev/vda", "disk")),
        ("/container/m", Storage("overlay", "overlay", "shared")),
        ("/twice/m", Storage("xfs", "/dev/b", "disk")),
    ):
        assert storage_of(path, mounts) == storage
    assert storage_of("/m", tmp_path / "none").file_system == "unknown"


# The numbers in csrc/io/file_system.cpp and the names that mountinfo has for such file systems.
NAMES_OF_NUMBERS = {
    "TMPFS_MAGIC": ("tmpfs", "devtmpfs", "rootfs"),
    "RAMFS_MAGIC": ("ramfs",),
    "HUGETLBFS_MAGIC": ("hugetlbfs",),
    "NFS_SUPER_MAGIC": ("nfs", "nfs4"),
    "SMB_SUPER_MAGIC": ("smbfs",),
    "V9FS_MAGIC": ("9p",),
    "AFS_SUPER_MAGIC": ("afs",),
    "FUSE_SUPER_MAGIC": ("fuse", "fuse.sshfs", "fuseblk", "virtiofs"),
    "OVERLAYFS_SUPER_MAGIC": ("overlay",),
    "kCephMagic": ("ceph",),
    "kCifsMagic": ("cifs",),
    "kSmb2Magic": ("smb3",),
    "kLustreMagic": ("lustre",),
}


def test_storage_is_what_a_load_takes_it_for(tmp_path: Path) -> None:
    source = (Path(__file__).parent.parent / "csrc" / "io" / "file_system.cpp").read_text()
    mounts, waiting, kinds = tmp_path / "mountinfo", [], {}
    for number, kind in re.findall(r"case (\w+):|return Storage::(\w+);", source.partition("switch")[2]):
        waiting += [number] if number else []
        if kind:
            # To who tunes, a file system in user space is like one of the network.
            kinds |= dict.fromkeys(waiting, "shared" if kind == "user_space" else kind)
            waiting = []
    assert kinds.pop("0") == "shared"  # the system does not say
    assert set(kinds) == set(NAMES_OF_NUMBERS)
    for number, kind in kinds.items():
        for name in NAMES_OF_NUMBERS[number]:
            mounts.write_text(f"1 0 8:1 / / rw - {name} source rw\n")
            assert storage_of("/m", mounts).kind == kind, name
    assert {name.split(".")[0] for names in NAMES_OF_NUMBERS.values() for name in names} == {
        *tune_storage.MEMORY, *tune_storage.SHARED
    }  # fmt: skip
    for name in ("ext4", "xfs", "btrfs", "zfs", "unknown"):
        mounts.write_text(f"1 0 8:1 / / rw - {name} source rw\n")
        assert storage_of("/m", mounts).kind == "disk"


def test_an_overlay_s_files_are_loaded_cold(tmp_path: Path) -> None:
    """The page cache of a container's files is known, so that they can be put out of it and verified to be."""
    lower, other, merged = (tmp_path / name for name in ("lower", "other", "merged"))
    for folder in (lower, other, merged):
        folder.mkdir()
    if storage_of(str(lower)).kind != "disk":
        pytest.skip("not on a local disk")
    write_tensors(lower / "m.safetensors", [("w", "U8", [3_000_000])])
    mount = ["mount", "-t", "overlay", "overlay", "-o", f"lowerdir={other}:{lower}", str(merged)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("overlayfs cannot be mounted here")
    try:
        file = merged / "m.safetensors"
        assert storage_of(str(file)) == Storage("overlay", "overlay", "shared")
        size = len(file.read_bytes())
        assert _C.resident_bytes(os.fsencode(file)) == size
        assert why_never_cold([str(file)]) is None
        assert _C.resident_bytes(os.fsencode(file)) == 0
    finally:
        subprocess.run(["umount", "--lazy", str(merged)], check=True)


@pytest.mark.simulated
def test_to_an_accelerator(
    simulated: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("SLOT", 65536), ("PINNED", 1 << 20), ("DEVICE_BLOCK", 1 << 20)):
        monkeypatch.setenv(f"WEIGHTLOAD_{name}_BYTES", str(value))
    path = write_tensors(tmp_path / "m.safetensors", [(f"{i}", "F32", [100_000]) for i in range(6)])
    out = tuned(capsys, path, "--device", DEVICE, "--seconds", PLENTY)
    assert f"to:          {DEVICE};" in out
    for setting in ("threads", "read direct", "read buffered", "slot_bytes", "pinned_bytes", "device_block_bytes"):
        assert setting in out
    assert "task_bytes" not in out

"""verify=: the SHA-256 of whole files, while they are loaded."""

from __future__ import annotations

import base64
import contextlib
import gc
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import simulated_accelerator
import torch
from safetensors.torch import load_file, save_file

import weightload
from weightload import _C, errors
from weightload._checkpoint.selection import open_files
from weightload._verify import checker, checking


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = []
    for number in range(3):
        path = tmp_path / f"model-0000{number + 1}-of-00003.safetensors"
        save_file({f"{number}.{i}": torch.randn(1200, 1001) for i in range(4)}, path)
        paths.append(path)
    return paths


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_sums(files: list[Path]) -> None:
    lines = [f"{digest(path)}  {path.name}\n" for path in files]
    (files[0].parent / "SHA256SUMS").write_text("".join(lines))


def damage(path: Path) -> None:
    """One bit of the last tensor."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def load(files: list[Path], verify: object = "sha256", **options: object) -> dict[str, torch.Tensor]:
    options.setdefault("to_cpu", True)
    return dict(weightload.safetensors_weights_iterator(files, verify=verify, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_right_files_load(files: list[Path], backend: str) -> None:
    write_sums(files)
    got = load(files, backend=backend)
    for path in files:
        for name, tensor in load_file(path).items():
            assert torch.equal(got[name], tensor)
    assert load(files, {path.name: digest(path).upper() for path in files}).keys() == got.keys()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


@pytest.mark.parametrize("number", range(3))
def test_a_bit_is_noticed(files: list[Path], number: int) -> None:
    write_sums(files)
    right = digest(files[number])
    damage(files[number])
    with pytest.raises(errors.ChecksumError) as raised:
        load(files)
    assert raised.value.filename == str(files[number])
    assert right in str(raised.value)
    assert digest(files[number]) in str(raised.value)


@pytest.mark.parametrize("there", [0, 1])
def test_without_threads(files: list[Path], there: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller that waits for the verdict hashes what no thread does."""
    started, left = threading.Thread.start, [there]

    def start(thread: threading.Thread) -> None:
        if thread.name == "weightload-verify":
            if not left[0]:
                raise RuntimeError("can't start new thread")
            left[0] -= 1
        started(thread)

    write_sums(files)
    right = load(files)
    monkeypatch.setattr(threading.Thread, "start", start)
    left[0] = there
    assert load(files).keys() == right.keys()
    damage(files[2])
    left[0] = there
    with pytest.raises(errors.ChecksumError):
        load(files)
    left[0] = there
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, verify="sha256")
    next(weights)
    weights.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


def test_also_where_no_tensor_of_it_is_wanted(files: list[Path]) -> None:
    write_sums(files)
    damage(files[2])
    with pytest.raises(errors.ChecksumError):
        load(files, names={"0.1"})


def test_the_hubs_cache_says_it(files: list[Path], tmp_path: Path) -> None:
    blob = tmp_path / "blobs" / digest(files[0])
    blob.parent.mkdir()
    files[0].rename(blob)
    link = tmp_path / "snapshot" / "model.safetensors"
    link.parent.mkdir()
    link.symlink_to(blob)
    assert load([link])
    damage(blob)
    with pytest.raises(errors.ChecksumError):
        load([link])


def test_what_is_not_known_is_refused(files: list[Path]) -> None:
    write_sums(files[:2])
    with pytest.raises(errors.CheckpointError, match="no SHA-256"):
        load(files)
    with pytest.raises(errors.CheckpointError, match="no digest"):
        load(files, {files[0].name: digest(files[0])})
    with pytest.raises(ValueError, match="sha256"):
        load(files, "md5")
    with pytest.raises(ValueError, match="64 hexadecimal"):
        load(files, {files[0].name: "abc"})
    with pytest.raises(TypeError):
        load(files, 5)


def test_leaving_early(files: list[Path]) -> None:
    write_sums(files)
    damage(files[2])
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, verify="sha256")
    next(weights)
    weights.close()
    with weightload.safetensors_weights_iterator(files, to_cpu=True, verify="sha256") as weights:
        next(weights)
    assert not [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


def test_with_other_names(files: list[Path]) -> None:
    write_sums(files)
    assert "new.0.0" in load(files, rename=lambda name: f"new.{name}")
    damage(files[1])
    with pytest.raises(errors.ChecksumError):
        load(files, rename=lambda name: f"new.{name}")


@pytest.mark.simulated
def test_to_an_accelerator(files: list[Path]) -> None:
    native = simulated_accelerator.load()
    write_sums(files)
    native.set_available(True)
    try:
        assert load(files, to_cpu=False, device="simulated:0")
        damage(files[0])
        with pytest.raises(errors.ChecksumError):
            load(files, to_cpu=False, device="simulated:0")
    finally:
        native.set_available(False)


RANKS = """
    import sys, weightload
    import torch.distributed as dist
    from weightload import errors
    dist.init_process_group("gloo")
    try:
        dict(weightload.safetensors_weights_iterator(
            sys.argv[1:], device="cpu", group=dist.group.WORLD, strategy="striped", verify="sha256"
        ))
    except errors.ChecksumError:
        print("noticed")
    dist.destroy_process_group()
"""


def test_every_rank_notices(files: list[Path], tmp_path: Path) -> None:
    write_sums(files)
    damage(files[1])
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent(RANKS))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, str(script), *map(str, files)],
        capture_output=True, text=True, timeout=300, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.stdout.count("noticed") == 2, done.stdout + done.stderr[-3000:]


def test_the_command(files: list[Path]) -> None:
    def verify() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "weightload", "verify", "--sha256", str(files[0].parent)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert "no SHA-256" in verify().stdout
    write_sums(files)
    done = verify()
    assert (done.returncode, done.stdout.count("its SHA-256 is right")) == (0, 3)
    damage(files[1])
    done = verify()
    assert (done.returncode, done.stdout.count("its SHA-256 is right")) == (1, 2)
    assert digest(files[1]) in done.stdout


def hashing() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "weightload-verify"]


def test_the_verdict_is_given_again(files: list[Path]) -> None:
    weights = weightload.safetensors_weights_iterator(
        files, to_cpu=True, verify=dict.fromkeys(map(name, files), "0" * 64)
    )
    for _ in range(2):
        with pytest.raises(errors.ChecksumError):
            list(weights)
    weights = weightload.safetensors_weights_iterator(files, to_cpu=True, verify={name(p): digest(p) for p in files})
    next(weights)
    weights.close()
    with pytest.raises(errors.WeightLoadError, match="before its files were checked"):
        list(weights)


def name(path: Path) -> str:
    return path.name


def test_a_loop_that_is_left_stops_the_hashing(files: list[Path]) -> None:
    write_sums(files)
    for _ in weightload.safetensors_weights_iterator(files, to_cpu=True, verify="sha256"):
        break
    gc.collect()
    assert not hashing()


def test_a_forked_child_waits_for_no_hashing(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def hashing_for_ever(file: _C.CheckpointFile, expected: str, arrived: Callable[[int], object]) -> None:
        while True:
            arrived(0)

    monkeypatch.setattr(checker, "check", hashing_for_ever)
    write_sums(files)
    for taken in (1, None):
        with weightload.safetensors_weights_iterator(files, to_cpu=True, verify="sha256") as weights:
            for _ in range(taken or len(weights)):
                next(weights)
            child = os.fork()
            if child == 0:
                signal.alarm(60)  # which ends it, should it wait
                with contextlib.suppress(errors.WeightLoadError):
                    if taken is None:
                        next(weights)
                        os._exit(1)
                weights.close()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert not hashing()


def module_of(files: list[Path]) -> torch.nn.Module:
    """With a parameter for each tensor of the files."""
    module = torch.nn.Module()
    for path in files:
        part = {key.partition(".")[2]: torch.nn.Parameter(torch.zeros_like(t)) for key, t in load_file(path).items()}
        module.add_module(next(iter(load_file(path))).partition(".")[0], torch.nn.ParameterDict(part))
    return module


@pytest.mark.parametrize("backend", ["mmap", "pread"])
@pytest.mark.parametrize("small", [False, True])
def test_load_file(files: list[Path], backend: str, small: bool) -> None:
    path = files[0]
    if small:
        save_file({"a": torch.arange(5)}, path)
    for verify in ({path.name: digest(path)}, "sha256"):
        write_sums(files)
        got = weightload.load_file(path, backend=backend, verify=verify)
        for key, tensor in load_file(path).items():
            assert torch.equal(got[key], tensor)
    right = digest(path)
    damage(path)
    with pytest.raises(errors.ChecksumError) as raised:
        weightload.load_file(bytes(path), backend=backend, verify="sha256")
    assert raised.value.filename == str(path)
    assert right in str(raised.value)
    assert digest(path) in str(raised.value)
    assert not hashing()
    with pytest.raises(ValueError, match="sha256"):
        weightload.load_file(path, verify="md5")
    with pytest.raises(errors.CheckpointError, match="no digest"):
        weightload.load_file(path, verify={})


def test_load_into_and_load_model(files: list[Path]) -> None:
    right = {name(path): digest(path) for path in files}
    module = module_of(files)
    weightload.load_into(module, files, verify=right)
    for path in files:
        for key, tensor in load_file(path).items():
            assert torch.equal(module.state_dict()[key], tensor)
    with pytest.raises(errors.ChecksumError, match=r"model-00002"):
        weightload.load_into(module_of(files), files, verify=right | {name(files[1]): "0" * 64})
    with pytest.raises(TypeError):
        weightload.load_into(module, files, verify=5)  # type: ignore[arg-type]
    one = module_of(files[:1])
    assert weightload.load_model(one, files[0], verify=right) == (set(), [])
    assert torch.equal(one.state_dict()["0.3"], load_file(files[0])["0.3"])
    for hooked in (False, True):
        one = module_of(files[:1])
        if hooked:
            one.register_load_state_dict_post_hook(lambda module, keys: None)
        with pytest.raises(errors.ChecksumError):
            weightload.load_model(one, files[0], verify={name(files[0]): "0" * 64})
    with pytest.raises(ValueError, match="64 hexadecimal"):
        weightload.load_model(one, files[0], verify={name(files[0]): "0"})
    assert not hashing()


@pytest.mark.simulated
def test_to_parameters_of_an_accelerator(files: list[Path]) -> None:
    native = simulated_accelerator.load()
    write_sums(files)
    native.set_available(True)
    try:
        module = module_of(files).to("simulated:0")
        weightload.load_into(module, files, verify="sha256")
        assert torch.equal(module.state_dict()["2.1"].cpu(), load_file(files[2])["2.1"])
        assert weightload.load_file(files[0], "simulated:0", verify="sha256")
        damage(files[0])
        with pytest.raises(errors.ChecksumError):
            weightload.load_into(module, files, verify="sha256")
        with pytest.raises(errors.ChecksumError):
            weightload.load_file(files[0], "simulated:0", verify="sha256")
        del module
    finally:
        native.set_available(False)


def test_names_with_folders(tmp_path: Path) -> None:
    paths = [tmp_path / folder / "model.safetensors" for folder in ("", "vae", "unet")]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        save_file({str(number): torch.full((5,), number)}, path)
    right = [digest(path) for path in paths]
    bare, vae, unet = "model.safetensors", "vae/model.safetensors", "unet/model.safetensors"
    # The one in the checkpoint's own folder is named without one.
    assert len(load(paths, {bare: right[0], vae: right[1], f"./{unet}": right[2]})) == 3
    assert len(load(paths[1:], {vae: right[1], unet: right[2], "other": "0" * 64})) == 2
    assert len(load(paths[1:2], {f"{tmp_path.name}/{vae}": right[1], vae: "0" * 64})) == 1  # the longer one
    assert len(load([*paths[1:2]], {bare: right[1]})) == 1
    with pytest.raises(errors.ChecksumError):
        load(paths[1:], {vae: right[2], unet: right[1]})
    with pytest.raises(errors.CheckpointError, match="say more of their paths"):
        load(paths, {bare: right[0], vae: right[1]})
    with pytest.raises(errors.CheckpointError, match="say more of their paths"):
        load(paths[1:], {bare: right[1]})
    with pytest.raises(errors.CheckpointError, match="no digest"):
        load(paths[1:], {f"x{vae}": right[1], unet: right[2]})
    with pytest.raises(errors.CheckpointError, match="two digests"):
        load(paths[1:2], {vae: right[1], f"./{vae}": right[2]})
    for odd in (str(paths[1]), f"../{vae}", "", "."):
        with pytest.raises(ValueError, match="below the checkpoint's folder"):
            load(paths[1:2], {odd: right[1]})
    with pytest.raises(TypeError, match="must be str"):
        load(paths[1:2], {paths[1]: right[1]})


@pytest.mark.parametrize("replaced", [False, True])
def test_what_was_replaced_while_it_was_opened_no_other_rank_has_checked(files: list[Path], replaced: bool) -> None:
    paths = [str(path) for path in files[:2]]
    verify = {name(path): digest(path) for path in files} | {name(files[0]): "0" * 64}

    def open_them() -> list[_C.CheckpointFile]:
        opened = open_files(paths)
        if replaced:
            copy = shutil.copy(paths[0], f"{paths[0]}.new")
            os.replace(copy, paths[0])
        return opened

    for rank in range(2):
        ours = checking.Checking(paths, verify, checking.Ranks(rank, 2, one_node=True))
        opened = ours.opening(open_them)()
        with pytest.raises(errors.ChecksumError) if replaced or rank == 0 else contextlib.nullcontext():
            ours.run(lambda: None)
        opened.clear()


def test_sums_that_are_none(files: list[Path]) -> None:
    sums = files[0].parent / "SHA256SUMS"
    os.mkfifo(sums)
    with pytest.raises(errors.CheckpointError, match="not a regular file"):
        load(files)
    sums.unlink()
    sums.write_text(f"{'0' * 64}  {files[0].name}\n{'1' * 64}  {files[0].name}\n")
    with pytest.raises(errors.CheckpointError, match="two digests"):
        load(files)


def test_in_base64_as_stores_have_it(files: list[Path]) -> None:
    """S3's ChecksumSHA256 of a whole object."""
    right = {path.name: f"sha256:{base64.b64encode(bytes.fromhex(digest(path))).decode()}" for path in files}
    assert load(files, right).keys() == load(files, None).keys()
    with pytest.raises(errors.ChecksumError):
        load(files, right | {files[0].name: right[files[1].name]})

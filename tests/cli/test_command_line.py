"""The weightload command: what it says and how it exits."""

from __future__ import annotations

import io
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import entry, file_bytes, write_tensors

from weightload import __version__
from weightload.cli import main as cli
from weightload.cli.load import touch


def test_inspect(real_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(real_checkpoint.parent)]) == 0
    out = capsys.readouterr().out
    assert "104 tensors" in out
    assert "90.87 MB" in out
    assert "format: pt" in out
    assert "F32 103" in out


def test_inspect_lists_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("w", "F6_E2M3", [2, 4])])
    assert cli.main(["inspect", str(path), "--tensors"]) == 0
    assert "w  F6_E2M3  [2, 4]  6 B" in capsys.readouterr().out


def test_inspect_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tensors(tmp_path / "m.safetensors", [("a", "BF16", [2, 3]), ("b", "U8", [])])
    assert cli.main(["inspect", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensor_count"] == 2
    assert found["tensor_bytes"] == 13
    assert found["dtypes"] == {"BF16": 1, "U8": 1}
    (file,) = found["files"]
    assert file["path"] == str(path)
    assert file["bytes"] == path.stat().st_size
    assert file["metadata"] is None
    assert file["tensors"][0]["shape"] == [2, 3]
    assert file["tensors"][0]["offset"] + 12 == file["tensors"][1]["offset"]


def test_verify(real_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--parity", str(real_checkpoint)]) == 0
    assert "104 tensors equal to safetensors'" in capsys.readouterr().out


@pytest.mark.parametrize("backend", ["mmap", "pread"])
def test_load(tmp_path: Path, capsys: pytest.CaptureFixture[str], backend: str) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", [(f"{name}{i}", "F32", [500_000]) for i in range(3)])
    command = ["load", str(tmp_path), "--touch", "--backend", backend]
    assert cli.main(command) == 0
    assert "6 tensors, 12.00 MB in " in capsys.readouterr().out
    assert cli.main([*command, "--stats"]) == 0
    out = capsys.readouterr().out
    for line in ("0.012 GB, 6 tensors, 2 file(s)", "open", "parse", "read", "consumer", "files", "bottleneck"):
        assert line in out
    assert cli.main([*command, "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert (stats["tensors"], stats["bytes"], stats["ended"]) == (6, 12_000_000, True)
    assert [file["read"] for file in stats["files"]] == [{"mmap": "mapped", "pread": "buffered"}[backend]] * 2


def test_touching_brings_in_every_page(tmp_path: Path) -> None:
    path = tmp_path / "pages"
    size = 50 * mmap.PAGESIZE
    path.write_bytes(bytes(size))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        tensor = torch.frombuffer(mapped, dtype=torch.float16).reshape(50, -1)
        touch(tensor)
        lines = Path("/proc/self/smaps").read_text().split(f"{path}\n")[1].splitlines()
        assert next(line.split()[1] for line in lines if line.startswith("Rss:")) == str(size // 1024)
        del tensor
    for tensor in (torch.zeros(()), torch.zeros(0), torch.zeros(3, 0, 2), torch.zeros(5, dtype=torch.bool)):
        touch(tensor)


def test_load_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(tmp_path / "m.safetensors", [])
    for how in ([], ["--stats"], ["--json"]):
        assert cli.main(["load", str(tmp_path), *how]) == 0
    assert "nothing to load" in capsys.readouterr().out


def test_verify_goes_on_after_a_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A list of one bad and one good shard that an index names."""
    write_tensors(tmp_path / "b.safetensors", [("b", "U8", [1])])
    (tmp_path / "a.safetensors").write_bytes(file_bytes({"a": entry("U8", [2], 0, 2)}, b"1"))
    assert cli.main(["verify", str(tmp_path / "a.safetensors")]) == 1
    assert "BAD" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "BAD" in out
    assert "ok   " in out


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_exit_codes(tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, str(tmp_path / "none")]) == 3
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"1234567")
    assert cli.main([command, str(bad)]) == 1
    output = capsys.readouterr()
    assert "header too small" in output.out + output.err
    with pytest.raises(SystemExit) as usage:
        cli.main([command])
    assert usage.value.code == 2


def test_a_device_or_a_setting_that_is_wrong_is_wrong_usage(
    real_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for device in ("nonsense", "xpu:0"):
        assert cli.main(["load", str(real_checkpoint), "--device", device]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    monkeypatch.setenv("WEIGHTLOAD_THREADS", "many")
    assert cli.main(["load", str(real_checkpoint)]) == 2


def test_ctrl_c_ends_a_command(
    real_checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weightload.cli.load.safetensors_weights_iterator", pressed)
    assert cli.main(["load", str(real_checkpoint)]) == 130
    assert capsys.readouterr().err == "weightload: stopped\n"


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], *([command, "--help"] for command in ("inspect", "verify", "load", "settings"))):
        with pytest.raises(SystemExit) as done:
            cli.main(arguments)
        assert done.value.code == 0
        assert "exit codes" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert __version__ in capsys.readouterr().out


def test_python_m_weightload(real_checkpoint: Path) -> None:
    command = [sys.executable, "-m", "weightload", "inspect", str(real_checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "104 tensors" in done.stdout


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_output_that_cannot_be_written(real_checkpoint: Path, options: list[str]) -> None:
    command = [sys.executable, "-m", "weightload", "inspect", *options, str(real_checkpoint)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr == "weightload: cannot print: [Errno 28] No space left on device\n"


def test_output_of_a_callers_own_that_fails(real_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Full(), closed):
        monkeypatch.setattr(sys, "stdout", stream)
        assert cli.main(["inspect", str(real_checkpoint)]) == 4


def test_output_into_a_closed_pipe(real_checkpoint: Path) -> None:
    command = f"{sys.executable} -m weightload inspect --json {real_checkpoint} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr

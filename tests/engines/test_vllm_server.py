"""``vllm serve --load-format weightload`` as a user types it: vLLM's own server, engine and workers, each a process."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from engine_support import STAND_INS, free_port, needs
from test_vllm import LLAMA, WIDE, write_model

pytestmark = [needs("vllm"), needs("uvicorn")]
SECONDS = 300


def answer(port: int, path: str) -> str | None:
    """Return the text of the server's answer; None while it does not listen."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answered:
            return str(answered.read().decode())
    except OSError:
        return None


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each of two workers to a CPU")
def test_a_server_of_two_ranks(tmp_path: Path) -> None:
    """It is ready when both workers have loaded, each its parts. To answer it would need kernels of the wheel."""
    model = write_model(tmp_path / "model", {**LLAMA, **WIDE})
    plugin = tmp_path / "plugin" / "cpu_platform-1.0.dist-info"
    plugin.mkdir(parents=True)
    (plugin / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-platform\nVersion: 1.0\n")
    (plugin / "entry_points.txt").write_text("[vllm.platform_plugins]\ncpu = cpu_platform:name\n")
    paths = [str(plugin.parent), str(STAND_INS), os.environ.get("PYTHONPATH", "")]
    cpus = sorted(os.sched_getaffinity(0))[:2]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, cpus)),
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
    }
    port, log = free_port(), tmp_path / "log"
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(model), "--load-format", "weightload"]
    command += ["--model-loader-extra-config", json.dumps({"threads": 2, "backend": "pread", "parts": True})]
    command += ["--tensor-parallel-size", "2", "--max-model-len", "64", "--port", str(port)]
    command += ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32"]
    with log.open("w") as written:
        server = subprocess.Popen(
            command, env=environment, stdout=written, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            end = time.monotonic() + SECONDS
            while (healthy := answer(port, "/health")) is None and server.poll() is None and time.monotonic() < end:
                time.sleep(0.2)
            said = log.read_text()
            assert healthy is not None, said[-6000:]
            assert json.loads(answer(port, "/v1/models") or "{}")["data"][0]["id"] == str(model)
        finally:
            server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(20)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)  # its session: whatever it has left
            server.wait()
    workers = set(re.findall(r"\((Worker_TP\d) .*weightload reads 3 files to the device cpu, in parts", said))
    assert workers == {"Worker_TP0", "Worker_TP1"}
    read = re.findall(r"weightload has read (\d+) of (\d+) bytes", said)
    assert len(read) == 2
    assert all(int(some) < 0.6 * int(whole) for some, whole in read)

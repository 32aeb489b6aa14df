"""Measures loads from a server on loopback, against the other ways of loading from one.

    python benchmarks/remote_loads.py --model-path MODEL [--networks plain "20 ms" ...] [--ways ...] [--rounds 3]
        [--json FILE]

Wants root, nginx with its Lua module, iproute2 (Debian: nginx libnginx-mod-http-lua iproute2), `pip install
'weightload[remote]'`, and for the others runai-model-streamer-s3, s3fs and boto3. What is missing is not measured.

The server is nginx with two workers, in a network namespace of its own, on files in the page cache; it answers any
signature, so that clients of S3 take it for a bucket. Networks: as it is; with each answer 20 ms late (the server
waits, no packet does); with 25 MB/s for each connection, as object stores have a rate for each; with a bandwidth of
1 Gbit/s (a token bucket). Each load is a process of its own, which has imported everything before the clock starts, in
shuffled turns; it is timed until every tensor is held in CPU memory and every page of it was touched. A sum over all
bytes must be the same for all. "raw ranged reads" are 16 threads with a connection each that read ranges of 8 MiB into
memory that was touched before: the limit. "into new memory" is the same into memory that is touched first by the reads,
as tensors are. On two CPUs the server takes a part of them, and so it does from everybody: so the processor's time of
each load is told, too.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import itertools
import json
import mmap
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from first_loads import against, digests_of
from harness.machine import describe, fill_cache

NAMESPACE = "weightload-remote"
PORTS = {"plain": 8801, "20 ms": 8802, "25 MB/s each": 8803, "1 Gbit/s": 8801}
RATE = "1gbit"
BUCKET = "bucket"
RANGE = 8 << 20
THREADS = 16

CONFIG = """
load_module /usr/lib/nginx/modules/ndk_http_module.so;
load_module /usr/lib/nginx/modules/ngx_http_lua_module.so;
worker_processes 2;
error_log {folder}/error.log;
pid {folder}/pid;
events {{ worker_connections 256; }}
http {{
  access_log off;
  sendfile on;
  tcp_nopush on;
  keepalive_requests 100000;
  server {{ listen 127.0.0.1:8801; location / {{ root {root}; }} }}
  server {{ listen 127.0.0.1:8802; location / {{ access_by_lua_block {{ ngx.sleep(0.02) }} root {root}; }} }}
  server {{ listen 127.0.0.1:8803; limit_rate 25m; location / {{ root {root}; }} }}
}}
"""


def address(network: str, scheme: str, name: str) -> str:
    return f"{scheme}://{BUCKET}/{name}" if scheme == "s3" else f"http://127.0.0.1:{PORTS[network]}/{BUCKET}/{name}"


def weightload_of(scheme: str, verify: str = "") -> Any:
    import obstore.store  # noqa: F401

    import weightload

    def load(network: str, names: list[str]) -> Any:
        addresses = [address(network, scheme, name) for name in names]
        how = {"verify": json.loads(os.environ["DIGESTS"])[verify]} if verify else {}
        return weightload.safetensors_weights_iterator(addresses, to_cpu=True, show_progress=False, **how)

    if verify:
        import awscrt.checksums  # noqa: F401

    return load


def runai() -> Any:
    from runai_model_streamer import SafetensorsStreamer

    def load(network: str, names: list[str]) -> Iterator[tuple[str, Any]]:
        with SafetensorsStreamer() as streamer:
            streamer.stream_files([address(network, "s3", name) for name in names])
            for name, tensor in streamer.get_tensors():
                yield name, tensor.clone()  # its memory is used again

    return load


def fsspec_of_s3() -> Any:
    import s3fs
    from safetensors.torch import load as load_bytes

    def load(network: str, names: list[str]) -> Iterator[tuple[str, Any]]:
        files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        for name in names:
            with files.open(f"{BUCKET}/{name}", "rb", block_size=RANGE, cache_type="readahead") as file:
                yield from load_bytes(file.read()).items()

    return load


def download() -> Any:
    import boto3
    from safetensors.torch import load_file

    def load(network: str, names: list[str]) -> Iterator[tuple[str, Any]]:
        client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
        with tempfile.TemporaryDirectory(dir=os.environ["DOWNLOADS"]) as folder:
            for name in names:
                path = Path(folder, name)
                client.download_file(BUCKET, name, str(path))
                yield from load_file(path).items()

    return load


WAYS: dict[str, Any] = {
    "weightload s3": lambda: weightload_of("s3"),
    "weightload http": lambda: weightload_of("http"),
    "weightload s3, crc32c": lambda: weightload_of("s3", "crc32c"),
    "weightload s3, sha256": lambda: weightload_of("s3", "sha256"),
    "run:ai streamer s3": runai,
    "s3fs, safetensors": fsspec_of_s3,
    "download, safetensors": download,
}
LIMIT = "raw ranged reads"
NEW_MEMORY = "the same, into new memory"


def one(way: str, network: str, sizes: dict[str, int]) -> dict[str, Any]:
    """In a process of its own."""
    if way in (LIMIT, NEW_MEMORY):
        before = time.process_time()
        seconds = raw_reads(network, sizes, is_new=way == NEW_MEMORY)
        return {"seconds": seconds, "cpu_seconds": time.process_time() - before}
    import torch

    load = WAYS[way]()
    begin, before = time.perf_counter(), time.process_time()
    held = []
    for _, tensor in load(network, list(sizes)):
        tensor.flatten().view(torch.uint8)[::4096].sum()
        held.append(tensor)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - before
    digest = sum(int(tensor.flatten().view(torch.uint8).sum(dtype=torch.int64)) for tensor in held)
    total = sum(tensor.nbytes for tensor in held)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "digest": digest, "bytes": total}


def raw_reads(network: str, sizes: dict[str, int], is_new: bool) -> float:
    ranges = iter([
        (name, begin, min(begin + RANGE, size)) for name, size in sizes.items() for begin in range(0, size, RANGE)
    ])  # fmt: skip
    lock = threading.Lock()
    places = 1 + sum(sizes.values()) // RANGE + len(sizes) if is_new else THREADS
    memory = mmap.mmap(-1, places * RANGE)
    if not is_new:
        memory.write(os.urandom(4096) * (len(memory) // 4096))
    into = itertools.count()

    def read(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", PORTS[network])
        while True:
            with lock:
                name, begin, end = next(ranges, (None, 0, 0))
            if name is None:
                return
            connection.request("GET", f"/{BUCKET}/{name}", headers={"Range": f"bytes={begin}-{end - 1}"})
            answer = connection.getresponse()
            assert answer.status == 206, answer.status
            place = (next(into) if is_new else number) * RANGE
            view, at = memoryview(memory)[place : place + end - begin], 0
            while at < end - begin:
                at += answer.readinto(view[at:])
            answer.read()

    begun = time.perf_counter()
    threads = [threading.Thread(target=read, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begun


def inside(*command: str) -> list[str]:
    return ["ip", "netns", "exec", NAMESPACE, *command]


@contextlib.contextmanager
def serving(files: Iterable[Path]) -> Iterator[None]:
    """The server, in its namespace."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary, "root")
        (root / BUCKET).mkdir(parents=True)
        for file in files:
            (root / BUCKET / file.name).symlink_to(file.resolve())
        for folder in (Path(temporary), root, root / BUCKET):
            folder.chmod(0o755)
        config = Path(temporary, "nginx.conf")
        config.write_text("user root;" + CONFIG.format(folder=temporary, root=root))
        subprocess.run(["ip", "netns", "add", NAMESPACE], check=True)
        try:
            subprocess.run(inside("ip", "link", "set", "lo", "up"), check=True)
            subprocess.run(inside("nginx", "-c", str(config), "-p", temporary), check=True)
            yield
        finally:
            subprocess.run(inside("nginx", "-c", str(config), "-p", temporary, "-s", "stop"), check=False)
            subprocess.run(["ip", "netns", "del", NAMESPACE], check=True)


def run(way: str, network: str, sizes: dict[str, int]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{PORTS[network]}",
        "AWS_ACCESS_KEY_ID": "someone",
        "AWS_SECRET_ACCESS_KEY": "something",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
    }
    command = inside(sys.executable, __file__, "--one", way, "--networks", network, "--sizes", json.dumps(sizes))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no answer"])[-1])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(network: str, ways: list[str], sizes: dict[str, int], rounds: int) -> list[dict[str, Any]]:
    limited = network == "1 Gbit/s"
    if limited:
        rule = ("tc", "qdisc", "add", "dev", "lo", "root", "tbf", "rate", RATE, "burst", "1mb", "latency", "50ms")
        subprocess.run(inside(*rule), check=True)
    loads: dict[str, list[dict[str, Any]]] = {way: [] for way in [LIMIT, NEW_MEMORY, *ways]}
    reasons: dict[str, str] = {}
    for number in range(-1, rounds):  # the first is not counted
        for way in random.sample(list(loads), len(loads)):
            if way in reasons:
                continue
            try:
                found = run(way, network, sizes)
            except RuntimeError as problem:
                reasons[way] = str(problem)
                continue
            if number >= 0:
                loads[way].append(found)
    if limited:
        subprocess.run(inside("tc", "qdisc", "del", "dev", "lo", "root"), check=True)
    digests = {(load["digest"], load["bytes"]) for found in loads.values() for load in found if "digest" in load}
    if len(digests) > 1:
        raise SystemExit("not all ways gave the same bytes")
    rows = [
        {"network": network, "way": way, "loads": found, **({"reason": reasons[way]} if way in reasons else {})}
        for way, found in loads.items()
    ]
    show(rows)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    seconds = {row["way"]: [load["seconds"] for load in row["loads"]] for row in rows}
    limit = statistics.median(seconds[LIMIT])
    ours = seconds.get("weightload s3") or []
    for row in rows:
        way = row["way"]
        if not seconds[way]:
            print(f"{row['network']:10} {way:24} not measured: {row.get('reason', '')[:90]}", flush=True)
            continue
        line = f"{row['network']:10} {way:24} {statistics.median(seconds[way]):7.3f} s"
        line += f"   {statistics.median(load['cpu_seconds'] for load in row['loads']):6.2f} s of the CPUs"
        line += f"   of the limit {limit / statistics.median(seconds[way]):.2f}"
        if ours and way not in ("weightload s3", LIMIT, NEW_MEMORY):
            line += f"   weightload s3 is {against(seconds[way], ours)} times as fast"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", type=os.path.abspath)
    parser.add_argument("--networks", nargs="+", choices=list(PORTS), default=list(PORTS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=[*WAYS, LIMIT, NEW_MEMORY], help=argparse.SUPPRESS)
    parser.add_argument("--sizes", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options.one, options.networks[0], json.loads(options.sizes))))
        return
    files = sorted(Path(options.model_path).glob("*.safetensors"))
    sizes = {file.name: file.stat().st_size for file in files}
    fill_cache([str(file) for file in files])
    kinds = [kind for kind in ("crc32c", "sha256") if any(way.endswith(kind) for way in options.ways)]
    os.environ["DIGESTS"] = json.dumps({kind: digests_of(kind, [str(file) for file in files]) for kind in kinds})
    os.environ.setdefault("DOWNLOADS", str(Path(options.model_path).parent))
    print(f"{sum(sizes.values()) / 1e9:.2f} GB in {len(sizes)} files, medians of {options.rounds}", flush=True)
    rows = []
    with serving(files):
        for network in options.networks:
            rows += measure(network, options.ways, sizes, options.rounds)
    if options.json:
        about = describe([str(file) for file in files])
        found = {**about, "benchmark": "remote loads", "bytes": sum(sizes.values()), "rows": rows}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

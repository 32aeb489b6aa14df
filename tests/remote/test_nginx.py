"""nginx, and what goes wrong by its own means (Debian: `apt-get install nginx-light`; skipped without)."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from nginx_server import NGINX, Nginx, nginx
from safetensors.torch import load_file, save_file
from servers import Handler, all_told, serving
from support.ranks.groups import assert_done, run_ranks

import weightload
from weightload import settings
from weightload._remote import stores
from weightload.errors import ChecksumError, HtmlPage, ReadError

pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx")

KIB, MIB = 1 << 10, 1 << 20
NAME = "model.safetensors"
FIRST = 256 * KIB  # of the request that brings the header
# Loads in many small requests, a few at once: after the first tensor most are still to be made.
SMALL = {"task_bytes": MIB, "block_bytes": MIB, "window_bytes": 4 * MIB, "requests": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model of 24 MiB, in tensors of one MiB."""
    path = tmp_path_factory.mktemp("model") / NAME
    write(path, 23)
    return path


def write(path: Path, seed: int, rows: int = 512) -> None:
    bits = torch.Generator().manual_seed(seed)
    save_file({f"{i:02}": torch.randn(rows, 512, generator=bits) for i in range(24)}, path)


@pytest.fixture
def served(model: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    (tmp_path / "served").mkdir()
    path = Path(shutil.copy(model, tmp_path / "served"))
    os.utime(path, (1_000_000_000, 1_000_000_000))  # a time that has settled
    return path


@pytest.fixture
def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library gives up after seconds, not after a minute."""
    monkeypatch.setitem(stores.RETRIES, "max_retries", 2)


def load(address: str, **options: object) -> dict[str, torch.Tensor]:
    with settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator([address], to_cpu=True, **options)  # type: ignore[arg-type]
    return dict(weights)


def require_same(got: dict[str, torch.Tensor], path: Path) -> None:
    want = load_file(path)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


def sent_with(server: Nginx) -> dict[int, int]:
    """Bytes, by status."""
    counted: dict[int, int] = {}
    for request in server.requests():
        counted[request.status] = counted.get(request.status, 0) + request.sent
    return counted


def test_what_a_load_costs(model: Path, tmp_path: Path) -> None:
    size = model.stat().st_size
    with nginx(tmp_path, model.parent) as server:
        address = server.address(NAME)
        with weightload.safe_open(address, "pt") as handle:
            assert sorted(handle.keys()) == [f"{i:02}" for i in range(24)]
            (opening,) = server.requests()
            assert (opening.status, opening.sent) == (206, FIRST)
            assert torch.equal(handle.get_slice("05")[100:200], load_file(model)["05"][100:200])
            _, rows = server.requests()
            assert (rows.status, rows.sent) == (206, 100 * 512 * 4)
            _, rows = server.requests()
        for call in (
            weightload.load_file,
            lambda path: dict(weightload.safetensors_weights_iterator(path, to_cpu=True)),
        ):
            before = len(server.requests())
            require_same(call(address), model)
            opening, *asked = server.requests()[before:]
            assert opening.sent == FIRST
            assert len(asked) <= 1 + size // (8 * MIB)
            assert size - FIRST <= sum(request.sent for request in asked) <= size
        before = len(server.requests())
        load(address, names={"07"})
        assert sum(request.sent for request in server.requests()[before:]) == FIRST + MIB
        assert {request.status for request in server.requests()} == {206}


RIGHT = {
    "as it is": ("", "", {206}),
    "without ranges": ("max_ranges 0;", "", {200}),
    "slow": ("limit_rate 3m;", "", {206}),
    "without tags": ("etag off;", "", {206}),
    "without tags and times": ('etag off; add_header Last-Modified "";', "", {206}),
    "weak tags": ("""etag off; add_header ETag 'W/"1"';""", "", {206}),
    "packs what it may": ("gzip on; gzip_types *; gzip_min_length 0;", "", {206}),
    "a connection a request": ("keepalive_requests 1;", "", {206}),
    "connections are closed": ("keepalive_timeout 0;", "", {206}),
    "sends on": (f"rewrite ^/{NAME}$ /moved/{NAME} redirect; location /moved/ {{ alias <root>/; }}", "", {302, 206}),
    "often fails": (
        "if ($fails) { return 500; }",
        "map $connection_requests $fails { default 0; ~3$ 1; }",
        {500, 206},
    ),
    "is often away": (
        "if ($fails) { return 503; }",
        "map $connection_requests $fails { default 0; ~3$ 1; }",
        {503, 206},
    ),
    "wants it slower": (
        "limit_req zone=all; limit_req_status 429;",
        "limit_req_zone $server_port zone=all:1m rate=40r/s;",
        {429, 206},
    ),
    "wants fewer at once": (
        "limit_rate 3m; limit_conn all 3;",
        "limit_conn_zone $server_port zone=all:1m;",
        {503, 206},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", RIGHT)
def test_right_bytes_from(model: Path, tmp_path: Path, kind: str) -> None:
    more, http, statuses = RIGHT[kind]
    with nginx(tmp_path, model.parent, more, http) as server:
        address = server.address(NAME)
        require_same(load(address), model)
        assert {request.status for request in server.requests()} == statuses
        with weightload.safe_open(address, "pt") as handle:
            assert torch.equal(handle.get_tensor("20"), load_file(model)["20"])
            assert torch.equal(handle.get_slice("05")[:, 7:9], load_file(model)["05"][:, 7:9])
        target = {name: torch.full((512, 512), 7.0) for name in load_file(model)}
        weightload.load_into(target, address)
        require_same(target, model)


def test_another_server_is_sent_to(model: Path, tmp_path: Path) -> None:
    with nginx(tmp_path / "other", model.parent) as other:
        with nginx(tmp_path / "first", model.parent, f"location / {{ return 302 {other.url}$request_uri; }}") as server:
            require_same(load(server.address(NAME)), model)
            assert {request.status for request in server.requests()} == {302}
        assert sent_with(other)[206] >= model.stat().st_size


# Requests for bytes behind the beginning.
LATER = 'map $http_range $later { default 1; ~^bytes=0- 0; "" 0; }'
LATER_RANGE = "map $http_range $its_range {{ default {}; ~^bytes=0- $http_range; }}"
PAGE = "default_type text/html; return 200 '<!DOCTYPE html><html>Sorry</html>';"
AGAIN = "location /again/ { alias <root>/; }"


def proxied(headers: str) -> str:
    """Asks itself."""
    return f"{AGAIN} location / {{ proxy_pass http://127.0.0.1:<port>/again/; proxy_http_version 1.1; {headers} }}"


WRONG: dict[str, tuple[str, str, type[Exception], str]] = {
    "nobody may": ("location / { deny all; }", "", PermissionError, "403"),
    "it is not there": ("location / { root <folder>; }", "", FileNotFoundError, "No such object"),
    "a page in place of an error": (
        "location / { root <folder>; error_page 404 =200 /sorry; } location = /sorry { " + PAGE + " }",
        "", HtmlPage, "HTML",
    ),
    "sent to log in": ("location / { return 302 /login; } location = /login { " + PAGE + " }", "", HtmlPage, "HTML"),
    "sent in a circle": ("location / { return 302 $request_uri; }", "", ReadError, "in a circle"),
    "sent to nobody": ("location / { return 302 http://127.0.0.1:1/; }", "", ReadError, "refuses connections"),
    "no such range": ("if ($later) { return 416; }", LATER, ReadError, "416"),
    "fails for ever": ("if ($later) { return 500; }", LATER, ReadError, "500"),
    "closes for ever": ("if ($later) { return 444; }", LATER, ReadError, "cut off"),
    "nobody behind it": ("location / { proxy_pass http://127.0.0.1:1; }", "", ReadError, "502"),
    "nobody may any more": ("if ($later) { return 403; }", LATER, ReadError, "403"),
    "it is gone": ("if ($later) { return 404; }", LATER, ReadError, "No such object"),
    "another range": (
        proxied("proxy_set_header Range $its_range;"),
        LATER_RANGE.format('"bytes=1-1000"'), ReadError, "another range",
    ),
    "no ranges any more": (
        proxied("proxy_set_header Range $its_range;"), LATER_RANGE.format('""'), ReadError, "no ranges",
    ),
    "packed": ("gzip_static always;", "", ReadError, "gzip"),
    "packed on the way": (
        f"gzip on; gzip_types *; gzip_proxied any; {proxied('proxy_set_header Accept-Encoding gzip;')}",
        "", ReadError, "how long|gzip",
    ),
    "of no length": ("sub_filter nothing-like-it else; sub_filter_types *;", "", ReadError, "how long"),
    "of no length, to the end": (
        "sub_filter nothing-like-it else; sub_filter_types *; chunked_transfer_encoding off;",
        "", ReadError, "how long",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_an_error_that_says(served: Path, tmp_path: Path, kind: str, few_tries: None) -> None:
    more, http, error, told = WRONG[kind]
    if kind == "packed":
        served.with_name(f"{NAME}.gz").write_bytes(gzip.compress(served.read_bytes(), 1))
    with nginx(tmp_path / "nginx", served.parent, more, http) as server:
        address = f"http://user:PASSWORD@{server.host}/{NAME}?sig=SECRET"
        for call in (load, weightload.load_file):
            with pytest.raises(error, match=told) as raised:
                call(address)
            assert server.address(NAME) in str(raised.value)
            assert getattr(raised.value, "filename", None) == server.address(NAME)
            assert "PASSWORD" not in all_told(raised.value)
            assert "SECRET" not in all_told(raised.value)


def test_a_name_and_a_password(model: Path, tmp_path: Path) -> None:
    (tmp_path / "users").write_text("me:{PLAIN}pass word\n")
    with nginx(tmp_path, model.parent, "auth_basic all; auth_basic_user_file <folder>/users;") as server:
        require_same(load(f"http://me:pass%20word@{server.host}/{NAME}"), model)
        for wrong in ("", "me:WRONG@", "NOBODY:WRONG@"):
            with pytest.raises(PermissionError, match="401") as raised:
                load(f"http://{wrong}{server.host}/{NAME}")
            assert server.address(NAME) in str(raised.value)
            assert "WRONG" not in all_told(raised.value)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl to make a certificate")
def test_a_certificate_that_nobody_knows(model: Path, tmp_path: Path, few_tries: None) -> None:
    made = ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert"), "-subj", "/CN=127.0.0.1", "-nodes"]
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", *made], check=True, capture_output=True)
    names = "ssl_certificate <folder>/cert; ssl_certificate_key <folder>/key;"
    with nginx(tmp_path, model.parent, names, tls=True) as server:
        for scheme, told in (("https", "certificate is not trusted"), ("http", "400")):
            with pytest.raises(ReadError, match=told) as raised:
                load(f"{scheme}://{server.host}/{NAME}")
            assert raised.value.filename == f"{scheme}://{server.host}/{NAME}"


def test_a_folder(model: Path, tmp_path: Path) -> None:
    """nginx is asked for each name that could be in the folder."""
    with nginx(tmp_path, model.parent) as server:
        assert weightload.resolve_safetensors_files(server.url) == [server.address(NAME)]


def test_a_folder_of_a_server_that_answers_with_pages(tmp_path: Path) -> None:
    with nginx(tmp_path, tmp_path, "location / { " + PAGE + " }") as server:
        with pytest.raises((OSError, weightload.errors.WeightLoadError)) as raised:
            weightload.load_file(weightload.resolve_safetensors_files(f"{server.url}/?sig=SECRET")[0])
        assert server.url in str(raised.value)
        assert "SECRET" not in all_told(raised.value)


def test_workers_that_are_killed(model: Path, tmp_path: Path) -> None:
    killed: list[int] = []
    got = {}
    with nginx(tmp_path, model.parent, "limit_rate 700k;") as server, settings.override(**SMALL):
        for name, tensor in weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True):
            got[name] = tensor
            if len(got) % 6 == 1:
                killed.append(server.kill_worker())
        assert server.worker() not in killed
    require_same(got, model)
    assert len(set(killed)) == 4


def test_reloads(model: Path, tmp_path: Path) -> None:
    got = {}
    with nginx(tmp_path, model.parent, "limit_rate 900k;") as server, settings.override(**SMALL):
        for name, tensor in weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True):
            got[name] = tensor
            server.reload()
    require_same(got, model)


def test_a_server_that_is_gone(model: Path, tmp_path: Path, few_tries: None) -> None:
    want = load_file(model)
    with nginx(tmp_path, model.parent) as server, settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True)
        got = [next(weights)]
        server.kill()
        with pytest.raises(ReadError, match=r"refuses connections|reset|closed|cut off") as raised:
            got.extend(weights)
        assert raised.value.filename == server.address(NAME)
    assert len(got) < len(want)
    assert all(torch.equal(tensor, want[name]) for name, tensor in got)


@pytest.mark.slow
def test_a_worker_that_stops_for_a_while(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the library waits for bytes; for ever in the end."""
    monkeypatch.setitem(stores.CLIENT, "read_timeout", "2s")
    want = load_file(model)
    with nginx(tmp_path, model.parent, "limit_rate 900k;") as server, settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True)
        got = [next(weights)]
        worker = server.worker()
        os.kill(worker, signal.SIGSTOP)
        server.wait_for_callers()  # so one request was given up, and is made again
        os.kill(worker, signal.SIGCONT)
        got.extend(weights)
        assert all(torch.equal(tensor, want[name]) for name, tensor in got)
        assert len(got) == len(want)
        monkeypatch.setitem(stores.RETRIES, "max_retries", 2)
        weights = weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True)
        next(weights)
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(ReadError, match="in time"):
            list(weights)


def test_more_requests_where_more_bring_more(model: Path, tmp_path: Path) -> None:
    """A server that holds each connection to a rate: the load begins with 16, and takes more."""
    small = {"task_bytes": 128 * KIB, "block_bytes": MIB, "window_bytes": 12 * MIB}
    with nginx(tmp_path, model.parent, "limit_rate 512k;") as server, settings.override(**small):
        require_same(dict(weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True)), model)
        of = {request.connection for request in server.requests() if request.range != f"bytes=0-{FIRST - 1}"}
    assert 16 < len(of) <= settings.MOST_REQUESTS


def replace(path: Path) -> None:
    write(path.with_name("new"), 24)
    assert path.with_name("new").stat().st_size == path.stat().st_size
    later = path.stat().st_mtime_ns + 5_000_000_000  # of which nginx makes its tags, by seconds
    os.utime(path.with_name("new"), ns=(later, later))
    path.with_name("new").replace(path)


def shorten(path: Path) -> None:
    os.truncate(path, 9 * MIB)


def make_smaller(path: Path) -> None:
    write(path.with_name("new"), 23, rows=500)
    path.with_name("new").replace(path)


CHANGES = {"another": replace, "smaller": make_smaller, "cut short": shorten, "gone": Path.unlink}


@pytest.mark.parametrize("kind", ["as it is", "without tags", "without ranges", "slow"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes(
    served: Path, model: Path, tmp_path: Path, change: str, kind: str, few_tries: None
) -> None:
    """Also when a worker dies with the old file's bytes on their way."""
    want = load_file(model)
    got = []
    with nginx(tmp_path / "nginx", served.parent, RIGHT[kind][0]) as server, settings.override(**SMALL):
        address = server.address(NAME)
        weights = weightload.safetensors_weights_iterator([address], to_cpu=True, cache=tmp_path / "copies")
        got.append(next(weights))
        CHANGES[change](served)
        server.kill_worker()
        with pytest.raises((ReadError, FileNotFoundError)) as raised:
            got.extend(weights)
        assert raised.value.filename == address
    assert all(torch.equal(tensor, want[name]) for name, tensor in got)
    assert not list((tmp_path / "copies").rglob("*.safetensors"))


def test_a_change_that_no_tag_tells(served: Path, model: Path, tmp_path: Path) -> None:
    """nginx's have the size and the second. Who must know has verify=."""
    times = served.stat().st_mtime_ns
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    with nginx(tmp_path / "nginx", served.parent) as server, settings.override(**SMALL):
        weights = weightload.safetensors_weights_iterator([server.address(NAME)], to_cpu=True, verify={NAME: digest})
        next(weights)
        replace(served)
        os.utime(served, ns=(times, times))
        with pytest.raises(ChecksumError):
            list(weights)


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "HTTP/1.0"])
def test_what_is_behind_it_cuts_off(
    model: Path, tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = model.read_bytes()
    cut: list[str] = []

    def cut_off(handler: Handler) -> bool:
        begin, end = map(int, handler.headers["Range"].removeprefix("bytes=").split("-"))
        if begin == 0 or begin % (2 * MIB) or handler.headers["Range"] in cut:
            return False
        cut.append(handler.headers["Range"])
        length = min(end + 1, len(data)) - begin
        headers = {"Content-Range": f"bytes {begin}-{begin + length - 1}/{len(data)}", "ETag": f'"{abs(hash(data))}"'}
        handler.reply(206, data[begin : begin + length // 2], headers, length=length)
        return True

    monkeypatch.setattr(Handler, "protocol_version", protocol)
    with serving(model.parent) as web:
        web.before = cut_off
        with nginx(tmp_path, model.parent, f"location / {{ proxy_pass {web.url}; }}") as server:
            require_same(load(server.address(NAME)), model)
    assert len(cut) > 5


SLICES = """
  location / {{
    slice 1m; proxy_cache slices; proxy_cache_key $uri$slice_range; proxy_cache_valid 206 1h;
    proxy_set_header Range $slice_range; proxy_http_version 1.1; proxy_pass {};
  }}
"""


def test_a_cache_of_slices(served: Path, model: Path, tmp_path: Path, few_tries: None) -> None:
    """Networks of caches keep slices of files. Slices of an old file must not be mixed with those of a new one."""
    want = load_file(model)
    cache = "proxy_cache_path <folder>/slices keys_zone=slices:1m;"
    with (
        serving(served.parent) as web,
        nginx(tmp_path / "nginx", served.parent, SLICES.format(web.url), cache) as server,
    ):
        address = server.address(NAME)
        require_same(load(address), model)
        asked = len(web.asked)
        require_same(load(address), model)
        assert len(web.asked) == asked
    with serving(served.parent) as web, nginx(tmp_path / "2", served.parent, SLICES.format(web.url), cache) as server:
        address = server.address(NAME)
        with settings.override(**SMALL):
            weights = weightload.safetensors_weights_iterator([address], to_cpu=True)
        got = [next(weights)]
        replace(served)
        with pytest.raises(ReadError) as raised:
            got.extend(weights)
        assert raised.value.filename == address
        assert all(torch.equal(tensor, want[name]) for name, tensor in got)


RANKS = """
import signal, urllib.request
from safetensors.torch import load_file
from weightload import errors, settings

address, path = sys.argv[4:]
small = {"task_bytes": 1 << 18, "block_bytes": 1 << 20, "window_bytes": 1 << 21, "requests": 4}


def kill(strategy):
    worker = urllib.request.urlopen(address.rpartition("/")[0] + "/worker").read()
    os.kill(int(worker), signal.SIGKILL)


def load(strategy, disturb, mark="disturbed"):
    want, got = load_file(path), []
    dist.barrier()
    with settings.override(**small):
        weights = weightload.safetensors_weights_iterator(
            [f"{address}?{mark}-{strategy}"], device="cpu", strategy=strategy, group=dist.group.WORLD)
    for name, tensor in weights:
        assert torch.equal(tensor, want[name])
        got.append(name)
        if len(got) == 4 and rank == 1:
            disturb(strategy)
    assert got == list(want)


for strategy in ("auto", "striped", "independent"):
    load(strategy, lambda strategy: None, "undisturbed")
    load(strategy, kill)
for strategy in ("auto", "striped"):
    try:
        load(strategy, lambda strategy: os.replace(f"{path}.{strategy}", path))
    except errors.ReadError as error:
        assert "changed while it was read" in str(error) and error.filename == address, error
    else:
        raise SystemExit("not noticed")
dist.barrier()
dist.destroy_process_group()
print("done")
"""


@pytest.mark.slow
def test_ranks(served: Path, tmp_path: Path) -> None:
    """They ask for each byte once, or each for all; a worker dies, or the file is replaced, in the middle of a load."""
    for seed, strategy in enumerate(("auto", "striped")):
        write(served.with_name(f"{NAME}.{strategy}"), seed)
        os.utime(served.with_name(f"{NAME}.{strategy}"), (seed, seed))
    with nginx(tmp_path / "nginx", served.parent) as server:
        assert_done(run_ranks(RANKS, 2, tmp_path, server.address(NAME), served))
        requests, size = server.requests(), served.stat().st_size
    for strategy, times in (("auto", 1), ("striped", 1), ("independent", 2)):
        sent = sum(request.sent for request in requests if request.address.endswith(f"?undisturbed-{strategy}"))
        assert times * (size - FIRST) <= sent <= times * size + 2 * FIRST

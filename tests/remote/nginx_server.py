"""A real nginx on loopback, which wants no privileges, with all that is its own in a folder of a test's."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
DEADLINE = 60.0  # seconds, for what takes a moment

CONFIGURATION = """
daemon off;
worker_processes 1;
pid <folder>/pid;
error_log <folder>/error.log;
events { worker_connections 256; }
http {
  log_format line escape=json '["$request_uri", "$http_range", "$status", "$body_bytes_sent", "$pid", "$connection"]';
  access_log <folder>/access.log line;
  client_body_temp_path <folder>/body;
  proxy_temp_path <folder>/proxy;
  fastcgi_temp_path <folder>/fastcgi;
  uwsgi_temp_path <folder>/uwsgi;
  scgi_temp_path <folder>/scgi;
  default_type application/octet-stream;
  <http>
  server {
    listen 127.0.0.1:<port> <tls>;
    root <root>;
    location = /worker { access_log off; return 200 $pid; }
    <server>
  }
}
"""


class Request(NamedTuple):
    """A line of nginx's access log."""

    address: str
    """Without the host."""
    range: str
    status: int
    sent: int
    """Bytes of the answer's body that went out."""
    worker: int
    connection: int


class Nginx:
    """One that runs, with one worker at a time."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, port: int, tls: bool) -> None:
        self._process, self._folder = process, folder
        self.host = f"127.0.0.1:{port}"
        self.url = f"{'https' if tls else 'http'}://{self.host}"
        self._port = port
        self._trust = ssl.create_default_context()
        self._trust.check_hostname, self._trust.verify_mode = False, ssl.CERT_NONE

    def address(self, name: str) -> str:
        return f"{self.url}/{name}"

    def worker(self) -> int:
        """The process that answers now."""
        with urllib.request.urlopen(self.address("worker"), timeout=DEADLINE, context=self._trust) as answer:
            return int(answer.read())

    def requests(self) -> list[Request]:
        """Return the requests so far, of a server that has had one worker all the time."""
        self.worker()  # which answers when the lines of all answers before are written
        lines = map(json.loads, (self._folder / "access.log").read_text().splitlines())
        return [Request(address, asked, *map(int, numbers)) for address, asked, *numbers in lines]

    def kill_worker(self) -> int:
        """And wait until it is gone; nginx starts another. Returns which it was."""
        worker = self.worker()
        descriptor = os.pidfd_open(worker)
        try:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            gone, _, _ = select.select([descriptor], [], [], DEADLINE)
        finally:
            os.close(descriptor)
        assert gone
        return worker

    def wait_for_callers(self) -> None:
        """Until somebody has connected whom a worker that is stopped has not accepted yet."""
        end = time.monotonic() + DEADLINE
        while _not_accepted(self._port) == 0:
            assert time.monotonic() < end
            time.sleep(0.02)

    def reload(self) -> None:
        """And wait until another worker answers; the one before ends when it has nothing to do."""
        before, end = self.worker(), time.monotonic() + DEADLINE
        self._process.send_signal(signal.SIGHUP)
        while self.worker() == before:
            assert time.monotonic() < end

    def kill(self) -> None:
        """All of it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.kill()
                raise


def _not_accepted(port: int) -> int:
    """Connections to a port of loopback that wait to be accepted, as Linux tells."""
    listening = "0A"
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, queues, *_ = line.split()
        if state == listening and int(local.split(":")[1], 16) == port:
            return int(queues.split(":")[1], 16)
    raise AssertionError(f"nobody listens on {port}")


@contextlib.contextmanager
def nginx(folder: Path, root: Path, server: str = "", http: str = "", tls: bool = False) -> Iterator[Nginx]:
    """Serves the files below ``root``.

    Args:
        folder: for all that is nginx's; made if it is not there.
        server, http: more of these blocks of its configuration, in which ``<folder>``, ``<root>`` and ``<port>`` stand
            for what they are.
        tls: speak it, by the certificate that the configuration names.
    """
    assert NGINX is not None
    folder.mkdir(exist_ok=True)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(512)
        listening.setblocking(False)  # nginx leaves that as it is
        port = listening.getsockname()[1]
        text = CONFIGURATION.replace("<http>", http).replace("<server>", server)
        for what, meant in (("folder", folder), ("root", root), ("port", port), ("tls", "ssl" if tls else "")):
            text = text.replace(f"<{what}>", str(meant))
        if os.geteuid() == 0:  # else its worker would be somebody who may not look into the folder
            text = "user root;\n" + text
        (folder / "nginx.conf").write_text(text)
        # This variable names sockets that nginx takes over. So nobody else can have the port meanwhile, and a client
        # that asks before nginx is ready waits.
        environment = {**os.environ, "NGINX": f"{listening.fileno()};"}
        options = ["-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
        process = subprocess.Popen(
            [NGINX, *options], env=environment, pass_fds=[listening.fileno()], start_new_session=True
        )
    running = Nginx(process, folder, port, tls)
    try:
        running.worker()
        yield running
    finally:
        running.stop()

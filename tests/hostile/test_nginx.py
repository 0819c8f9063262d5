"""Trainers behind a real nginx: the files of deploy/nginx pass everything on, and an error of nginx names its cause."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import shardloss
from shardloss.channel import error_of
from shardloss.errors import ServerUnavailable, ShardlossError, TableNotFound, Unauthenticated
from shardloss_server.__main__ import app
from shardloss_server.config import Security
from shardloss_server.rpc.serve import Server
from typer.testing import CliRunner

from ..patience import PATIENCE_S, eventually
from .credentials import Secrets, secrets_in, serving
from .test_tls import Authority, authority_in

FOLDER = Path(__file__).resolve().parents[2] / "deploy/nginx"
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
STREAM = next(Path("/").glob("usr/lib*/nginx/modules/ngx_stream_module.so"), None)
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx is not installed (Debian: nginx-light)")
MAIN = """
daemon off;
worker_processes 1;
pid {folder}/pid;
error_log {folder}/log;
events {{ worker_connections 256; }}
"""
HTTP = """
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    include {folder}/site.conf;
}}
"""
Edit = Callable[[str], str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def placed(name: str, port: int, upstream: str, authority: Authority | None = None) -> str:
    """Return a file of deploy/nginx with this test's ports and certificate in place of the page's."""
    text = (FOLDER / name).read_text()
    text, num_ports = re.subn(r"listen 443\b", f"listen 127.0.0.1:{port}", text)
    text, num_servers = re.subn(r"127\.0\.0\.1:7070\b", upstream, text)
    assert (num_ports, num_servers) == (1, 1)
    if authority is not None:
        cert, key = authority.pair("nginx", "localhost", "127.0.0.1")
        for old, new in (("cert.pem", cert), ("key.pem", key)):
            assert f"/etc/nginx/shardloss/{old}" in text
            text = text.replace(f"/etc/nginx/shardloss/{old}", str(new))
    return text


@contextmanager
def running(folder: Path, made: Callable[[int], str]) -> Iterator[int]:
    """Run nginx in a folder with the configuration for a port, and yield the port; if it is taken, try another one."""
    assert NGINX is not None
    for _ in range(5):
        port = free_port()
        (folder / "nginx.conf").write_text(made(port))
        command = [NGINX, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "log")]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                eventually(lambda: accepts(port) or process.poll() is not None, "nginx")  # noqa: B023
                if process.poll() is None:
                    yield port
                    return
            finally:
                process.terminate()
                process.wait(PATIENCE_S)
    pytest.fail((folder / "log").read_text())


@dataclass(frozen=True)
class Proxied:
    """A server with tokens behind nginx, which ends TLS."""

    authority: Authority
    secrets: Secrets
    folder: Path

    def nginx(self, upstream: str, edit: Edit = lambda text: text) -> AbstractContextManager[int]:
        """Run nginx with the file of deploy/nginx, after an edit of its text."""

        def made(port: int) -> str:
            (self.folder / "site.conf").write_text(edit(placed("shardloss.conf", port, upstream, self.authority)))
            return (MAIN + HTTP).format(folder=self.folder)

        return running(self.folder, made)

    def connect(self, port: int, timeout_s: float = 60.0, token: str = "admin") -> shardloss.LossClient:
        secret = self.secrets.token(token) if token else "unknown"
        ca = self.authority.ca_file
        return shardloss.connect(f"localhost:{port}", timeout_s=timeout_s, ca_file=ca, token=secret)


@pytest.fixture
def proxied(tmp_path: Path) -> Proxied:
    folders = [tmp_path / name for name in ("authority", "secrets", "nginx")]
    for folder in folders:
        folder.mkdir()
    return Proxied(authority_in(folders[0]), secrets_in(folders[1]), folders[2])


@pytest.fixture
def server(proxied: Proxied) -> Iterator[Server]:
    with serving(Security(tokens_file=proxied.secrets.tokens_file)) as server:
        yield server


def changed(pattern: str, new: str) -> Edit:
    """Return an edit that replaces one line of the configuration."""

    def edit(text: str) -> str:
        text, num = re.subn(rf"(?m)^\s*{pattern}.*$", new, text)
        assert num == 1
        return text

    return edit


def step(client: shardloss.LossClient, name: str, num_rows: int, dim: int) -> None:
    """Train one step, and check the loss against the one that the rows give."""
    table = client.create_table(name, num_classes=11, dim=dim, initializer=shardloss.Normal(stddev=0.1))
    hidden = np.random.default_rng(7).standard_normal((num_rows, dim), dtype=np.float32)
    labels = np.arange(num_rows) % 11
    logits = hidden @ np.asarray(table.read_rows(np.arange(11)).rows).T
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(num_rows), labels]
    session = table.session()
    loss = session.compute_loss(hidden, labels, shardloss.FullSoftmax())
    np.testing.assert_allclose(loss.loss, expected, rtol=1e-4, atol=1e-4)
    session.commit([(loss, None)], learning_rate=0.1)


def test_our_settings_pass_everything_on(proxied: Proxied, server: Server) -> None:
    """Large losses and streams, TLS, tokens and the details of errors; health needs no token."""
    with proxied.nginx(server.address) as port, proxied.connect(port) as client:
        step(client, "one-message", 512, 512)
        step(client, "streamed", 4096, 1024)
        with pytest.raises(TableNotFound):
            client.table("absent")
        with pytest.raises(Unauthenticated, match="unknown to this server"):
            proxied.connect(port, token="")
        probe = ["health", "--address", f"localhost:{port}", "--ca-file", str(proxied.authority.ca_file)]
        assert CliRunner().invoke(app, [*probe, "--timeout-s", "60"]).output.endswith(": SERVING\n")


def test_the_default_body_size_is_named(proxied: Proxied, server: Server) -> None:
    """nginx accepts 1 MB by default, and answers 413 to more."""
    with (
        proxied.nginx(server.address, changed("client_max_body_size", "")) as port,
        proxied.connect(port) as client,
        pytest.raises(ShardlossError, match="413"),
    ):
        step(client, "large", 512, 1024)


def failure(proxied: Proxied, port: int) -> ShardlossError:
    """Return the error of one call without repetition, which a client would make until its own time is over."""
    credentials = grpc.ssl_channel_credentials(proxied.authority.ca_file.read_bytes())
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary("/shardloss.v1.ServerService/GetServerInfo")(b"", timeout=PATIENCE_S)
        return error_of(caught.value)


def test_a_server_that_does_not_answer_is_named(proxied: Proxied) -> None:
    """When grpc_read_timeout has passed, nginx answers 504."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        upstream = f"127.0.0.1:{silent.getsockname()[1]}"
        with proxied.nginx(upstream, changed("grpc_read_timeout", "grpc_read_timeout 1s;")) as port:
            error = failure(proxied, port)
    assert isinstance(error, ServerUnavailable)
    assert "504" in str(error)


def test_a_server_that_is_down_is_named(proxied: Proxied) -> None:
    """nginx answers 502 at once, as long as nobody listens behind it."""
    with proxied.nginx(f"127.0.0.1:{free_port()}") as port:
        error = failure(proxied, port)
    assert isinstance(error, ServerUnavailable)
    assert "502" in str(error)


@pytest.mark.skipif(STREAM is None, reason="nginx has no stream module (Debian: libnginx-mod-stream)")
def test_a_proxy_that_passes_tcp_through_leaves_tls_to_the_server(proxied: Proxied) -> None:
    """The server sees the client's own certificate, and answers with its own."""

    def made(port: int) -> str:
        site = placed("passthrough.conf", port, server.address)
        return f"load_module {STREAM};" + MAIN.format(folder=proxied.folder) + site

    certificate, key = proxied.authority.pair("client", "client.example.org")
    own = {"ca_file": proxied.authority.ca_file, "client_cert_file": certificate, "client_key_file": key}
    with (
        serving(proxied.authority.mutual()) as server,
        running(proxied.folder, made) as port,
        shardloss.connect(f"localhost:{port}", timeout_s=60.0, **own) as client,
    ):
        step(client, "mine", 2048, 1024)

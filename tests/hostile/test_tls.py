"""TLS and mutual TLS: certificates of both sides, their rotation while the server runs, and invalid settings."""

from __future__ import annotations

import os
import socket
import ssl
import warnings
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest
import shardloss
import trustme
from shardloss.channel import error_of
from shardloss.errors import InvalidArgument, PermissionDenied, ServerUnavailable, Unauthenticated
from shardloss_server.__main__ import app
from shardloss_server.cluster.local import LocalGroup
from shardloss_server.config import CannotServe, Limits, Security, ServerConfig
from shardloss_server.rpc.serve import Server
from typer.testing import CliRunner

from .credentials import Secrets, code_of, eventually, secrets_in, serving

LIST = "/shardloss.v1.TableService/ListTables"
CREATE = "/shardloss.v1.TableService/CreateTable"
PAST = datetime.now(UTC) - timedelta(days=2)


@dataclass(frozen=True)
class Authority:
    """A certificate authority and the folder of its PEM files."""

    folder: Path
    ca: trustme.CA

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    def pair(self, name: str, *names: str, expired: bool = False, mode: int = 0o600) -> tuple[Path, Path]:
        """Issue a (certificate, key) for these host names; it replaces the files NAME.pem and NAME.key."""
        certificate, key = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        dates = {"not_before": PAST, "not_after": PAST + timedelta(days=1)} if expired else {}
        issued = self.ca.issue_cert(*names, common_name=name, **dates)
        issued.private_key_pem.write_to_path(str(key.with_suffix(".part")))
        os.chmod(key.with_suffix(".part"), mode)
        issued.cert_chain_pems[0].write_to_path(str(certificate))
        os.replace(key.with_suffix(".part"), key)
        return certificate, key

    def server(self, *names: str, **options: bool) -> Security:
        """Return a server's TLS settings with a new certificate."""
        certificate, key = self.pair("server", *(names or ("localhost", "127.0.0.1")), **options)  # type: ignore[arg-type]
        return Security(tls_cert_file=certificate, tls_key_file=key)

    def mutual(self) -> Security:
        return replace(self.server(), tls_client_ca_file=self.ca_file)


@pytest.fixture
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return authority_in(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def secrets(tmp_path: Path) -> Secrets:
    return secrets_in(tmp_path)


def authority_in(folder: Path) -> Authority:
    ca = trustme.CA()
    ca.cert_pem.write_to_path(str(folder / "ca.pem"))
    return Authority(folder, ca)


def refuses(server: Server, **options: object) -> None:
    """Assert that no client can connect with these options, on either port."""
    for address in (server.address, server.admin_address):
        with pytest.raises(ServerUnavailable):
            shardloss.connect(address, timeout_s=0.3, **options)  # type: ignore[arg-type]


def works(address: str, **options: object) -> bool:
    """Return True if a client can connect with these options."""
    try:
        with shardloss.connect(address, timeout_s=30.0, **options):  # type: ignore[arg-type]
            return True
    except ServerUnavailable:
        return False


def test_tls_on_both_ports_with_a_token(authority: Authority, secrets: Secrets) -> None:
    """A client with the right CA and a token connects; a wrong CA, the system's roots or plaintext fails."""
    security = replace(authority.server(), tokens_file=secrets.tokens_file)
    stranger = authority_in(secrets.folder)
    with serving(security) as server:
        for address in (server.address, server.admin_address):
            assert works(address, ca_file=authority.ca_file, token=secrets.token("reader"))
        with pytest.raises(Unauthenticated):
            shardloss.connect(server.address, ca_file=authority.ca_file)
        for options in ({"ca_file": stranger.ca_file}, {"tls": True}, {}):
            refuses(server, token=secrets.token("admin"), **options)


def test_a_certificate_of_another_name_or_time_is_refused(authority: Authority) -> None:
    """The client refuses a server certificate that is expired or issued for another host name."""
    with serving(authority.server("elsewhere.example.org")) as server:
        refuses(server, ca_file=authority.ca_file)
    with serving(authority.server(expired=True)) as server:
        refuses(server, ca_file=authority.ca_file)


def test_mutual_tls_without_tokens_takes_its_own_clients_as_admins(
    authority: Authority, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Clients with a certificate of the CA are admins; a missing, foreign or expired certificate is refused."""
    stranger = authority_in(tmp_path_factory.mktemp("stranger"))
    certificate, key = authority.pair("client", "client.example.org")
    own = {"client_cert_file": certificate, "client_key_file": key}
    foreign, foreign_key = stranger.pair("client", "client.example.org")
    old, old_key = authority.pair("old", "client.example.org", expired=True)
    with serving(authority.mutual()) as server:
        with shardloss.connect(server.address, ca_file=authority.ca_file, **own) as client:  # type: ignore[arg-type]
            client.create_table("mine", num_classes=3, dim=2)
        refuses(server, ca_file=authority.ca_file)
        refuses(server, ca_file=authority.ca_file, client_cert_file=foreign, client_key_file=foreign_key)
        refuses(server, ca_file=authority.ca_file, client_cert_file=old, client_key_file=old_key)
        refuses(server)


def test_mutual_tls_with_a_tokens_file_goes_by_the_certificates_name(authority: Authority, secrets: Secrets) -> None:
    """[[certificate]] entries assign roles by common or alternative name; a token, if present, takes precedence."""
    with secrets.tokens_file.open("a") as file:
        file.write('\n[[certificate]]\nname = "trainer.example.org"\nrole = "trainer"\n')
        file.write('\n[[certificate]]\nname = "by-common-name"\nrole = "reader"\n')
    named = authority.pair("one", "other.example.org", "trainer.example.org")
    common = authority.pair("by-common-name", "x.example.org")
    unknown = authority.pair("two", "two.example.org")
    roots = authority.ca_file.read_bytes()

    def channel(server: Server, pair: tuple[Path, Path]) -> grpc.Channel:
        chain, key = (path.read_bytes() for path in pair)
        return grpc.secure_channel(server.address, grpc.ssl_channel_credentials(roots, key, chain))

    commit, stream = "/shardloss.v1.LossService/Commit", "/shardloss.v1.LossService/StreamLoss"
    with serving(replace(authority.mutual(), tokens_file=secrets.tokens_file)) as server:
        with channel(server, named) as by_name:
            assert code_of(by_name, LIST)[0] == "OK"
            assert code_of(by_name, commit)[0] not in ("UNAUTHENTICATED", "PERMISSION_DENIED")
            assert code_of(by_name, stream, streams=True)[0] not in ("UNAUTHENTICATED", "PERMISSION_DENIED")
            assert code_of(by_name, CREATE) == (
                "PERMISSION_DENIED",
                f"{CREATE} needs the role admin; the certificate has trainer",
            )
            for name, status in (("admin", "INVALID_ARGUMENT"), ("reader", "PERMISSION_DENIED")):
                assert code_of(by_name, CREATE, (("authorization", f"Bearer {secrets.token(name)}"),))[0] == status
            assert code_of(by_name, LIST, (("authorization", "Bearer wrong"),))[0] == "UNAUTHENTICATED"
            with pytest.raises(grpc.RpcError) as without_message:
                by_name.stream_unary(LIST)(iter(()), timeout=60)
            assert error_of(without_message.value).reason == "INVALID_ARGUMENT"
            assert "grpc-status-details-bin" in dict(without_message.value.trailing_metadata())
        with channel(server, common) as by_common_name:
            assert code_of(by_common_name, LIST)[0] == "OK"
            assert code_of(by_common_name, commit)[0] == "PERMISSION_DENIED"
            assert code_of(by_common_name, stream, streams=True)[0] == "PERMISSION_DENIED"
        with channel(server, unknown) as nobody:
            status, message = code_of(nobody, LIST)
            assert (status, "[[certificate]]" in message) == ("UNAUTHENTICATED", True)
        chain, key = named
        with (
            shardloss.connect(
                server.address, ca_file=authority.ca_file, client_cert_file=chain, client_key_file=key
            ) as client,
            pytest.raises(PermissionDenied),
        ):
            client.delete_table("none")


@pytest.fixture
def shown(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.ca_file))
    context.set_alpn_protocols(["h2"])
    return context


def certificate_of(address: str, context: ssl.SSLContext) -> bytes:
    """Return the certificate that a port presents to a new connection, in DER; empty if none."""
    host, _, port = address.rpartition(":")
    plain = socket.create_connection((host, int(port)), timeout=60)
    with plain, context.wrap_socket(plain, server_hostname="localhost") as sock:
        return sock.getpeercert(binary_form=True) or b""


def test_certificates_change_without_a_restart(
    authority: Authority, shown: ssl.SSLContext, caplog: pytest.LogCaptureFixture
) -> None:
    """New connections get the new certificate, old ones continue, and a broken file is logged and ignored."""
    security = authority.server()
    assert security.tls_key_file is not None
    with serving(security) as server:
        addresses = (server.address, server.admin_address)
        first = [certificate_of(address, shown) for address in addresses]
        assert first[0] == first[1]
        with shardloss.connect(server.address, ca_file=authority.ca_file) as client:
            authority.server()
            for address in addresses:
                assert eventually(lambda address=address: certificate_of(address, shown) != first[0])  # type: ignore[misc]
            second = certificate_of(server.address, shown)
            security.tls_key_file.write_text("no key")
            for address in addresses:
                assert certificate_of(address, shown) == second
            assert "stays in use" in caplog.text
            authority.server()
            assert eventually(lambda: certificate_of(server.address, shown) != second)
            assert client.list_tables() == []


def test_old_versions_of_tls_are_refused(authority: Authority) -> None:
    """The server refuses TLS 1.1 and accepts 1.2."""
    with serving(authority.server()) as server:
        for version, is_taken in ((ssl.TLSVersion.TLSv1_1, False), (ssl.TLSVersion.TLSv1_2, True)):
            context = ssl.create_default_context(cafile=str(authority.ca_file))
            context.set_ciphers("DEFAULT@SECLEVEL=0")  # otherwise this client would not offer 1.1
            context.set_alpn_protocols(["h2"])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version, context.maximum_version = version, version
            if is_taken:
                assert certificate_of(server.address, context)
            else:
                with pytest.raises((ssl.SSLError, ConnectionError)):
                    certificate_of(server.address, context)


def test_what_does_not_fit_is_refused_at_the_start(authority: Authority, tmp_path: Path) -> None:
    """A missing file, another certificate's key, a file that is not PEM or an incomplete pair raises CannotServe."""
    good = authority.server()
    _, other = authority.pair("other", "x")
    junk = tmp_path / "junk.pem"
    junk.write_text("no PEM")
    bad = [
        (replace(good, tls_key_file=tmp_path / "absent"), "cannot read .*absent"),
        (replace(good, tls_key_file=other), "do not match"),
        (replace(good, tls_cert_file=junk), "junk.pem"),
        (replace(good, tls_client_ca_file=junk), "tls_client_ca_file .*junk.pem"),
        (replace(good, tls_key_file=None), "tls_key_file"),
        (Security(tls_key_file=good.tls_key_file), "tls_cert_file"),
        (Security(tls_client_ca_file=authority.ca_file), "tls_cert_file"),
        (Security(tokens_file=tmp_path / "absent.toml"), "cannot read .*absent.toml"),
        (Security(tokens_file=junk), "junk.pem is invalid: it is not TOML"),
    ]
    for security, words in bad:
        with pytest.raises(CannotServe, match=words), serving(security):
            pass


def test_a_key_that_others_may_read_is_told(authority: Authority, caplog: pytest.LogCaptureFixture) -> None:
    """If other users may read the key, the server logs its mode and starts anyway."""
    with serving(authority.server(mode=0o640)):
        assert "mode 640" in caplog.text
    caplog.clear()
    with serving(authority.server()):
        assert "mode" not in caplog.text


def test_a_clients_own_files_are_checked_at_once(authority: Authority, tmp_path: Path) -> None:
    """A bad file raises InvalidArgument with its field before the client connects."""
    certificate, key = authority.pair("client", "x")
    _, other = authority.pair("other", "x")
    junk = tmp_path / "junk.pem"
    junk.write_text("no PEM")
    for options, field in [
        ({"ca_file": tmp_path / "absent"}, "ca_file"),
        ({"ca_file": junk}, "ca_file"),
        ({"client_cert_file": certificate}, "client_cert_file"),
        ({"client_cert_file": certificate, "client_key_file": other}, "client_cert_file"),
    ]:
        with pytest.raises(InvalidArgument) as caught:
            shardloss.connect("127.0.0.1:1", **options)  # type: ignore[arg-type]
        assert caught.value.field == field
    assert key.exists()


@pytest.mark.parametrize("is_encrypted", [True, False])
def test_a_peer_that_connects_and_stays_silent_is_closed(authority: Authority, is_encrypted: bool) -> None:
    """On both ports it has as long as any silent peer, peer_ping_s + peer_answer_s; gRPC grants TLS two minutes."""
    security = authority.server() if is_encrypted else Security()
    group = LocalGroup(1)
    server = Server(group, ServerConfig(limits=Limits(peer_ping_s=1.0, peer_answer_s=1.0), security=security))
    server.start()
    with ExitStack() as stack:
        stack.callback(group.close)
        stack.callback(server.stop, 0.0)
        for address in (server.address, server.admin_address):
            host, port = address.rsplit(":", 1)
            peer = stack.enter_context(socket.create_connection((host, int(port)), timeout=60.0))
            while peer.recv(4096):  # the settings that gRPC sends first
                pass


def test_the_health_command_names_a_file_that_it_cannot_use(authority: Authority) -> None:
    """It says which, in one line; a client's certificate without a CA means TLS with the system's roots."""
    certificate, key = authority.pair("client", "client.example.org")
    other_key = authority.pair("other", "other.example.org")[1]
    ca = ("--ca-file", authority.ca_file)
    mine = ("--client-cert-file", certificate)
    for arguments, words in (
        (("--ca-file", key), "ca_file cannot be used"),
        (("--ca-file", authority.folder), "ca_file"),
        (("--ca-file", authority.folder / "none"), "No such file"),
        ((*ca, *mine, "--client-key-file", other_key), "client_cert_file cannot be used"),
        ((*ca, *mine), "client_cert_file and client_key_file together"),
    ):
        done = CliRunner().invoke(app, ["health", *map(str, arguments)])
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.exception
        assert words in done.output
    with serving(authority.mutual()) as server:
        whole = (*ca, *mine, "--client-key-file", key, "--address", server.admin_address, "--timeout-s", 60)
        assert CliRunner().invoke(app, ["health", *map(str, whole)]).output.endswith(": SERVING\n")
        without_ca = CliRunner().invoke(app, ["health", *map(str, whole[2:])])
        assert "the server's certificate is not accepted" in without_ca.output

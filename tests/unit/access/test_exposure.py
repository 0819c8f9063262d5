"""On a non-loopback address callers must authenticate, and no token is sent over a network in plaintext."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import shardloss
from shardloss.address import is_local, is_loopback
from shardloss.credentials import Bearer, Credentials
from shardloss.errors import InvalidArgument
from shardloss_server.__main__ import app
from shardloss_server.access.exposure import refuse_exposed
from shardloss_server.config import CannotServe, Security
from typer.testing import CliRunner

LOOPBACK = ["localhost", "LOCALHOST", "localhost.", "127.0.0.1", "127.3.2.1", "::1", "[::1]", "::ffff:127.0.0.1"]
EXPOSED = [
    "",
    "0.0.0.0",
    "::",
    "[::]",
    "10.0.0.7",
    "192.168.1.1",
    "fe80::1",
    "trainer-7",
    "localhost.example.org",
    "128.0.0.1",
]
FILE = Path("f")
TOKENS, TLS = Security(tokens_file=FILE), Security(tls_cert_file=FILE, tls_key_file=FILE)


@pytest.mark.parametrize("host", LOOPBACK + EXPOSED)
def test_loopback_is_what_only_this_machine_reaches(host: str) -> None:
    """Loopback addresses and localhost are local; wildcard addresses and all other names are not."""
    assert is_loopback(host) == (host in LOOPBACK)


@pytest.mark.parametrize(
    "security, needs",
    [
        (Security(), "allow_anonymous"),
        (TLS, "allow_anonymous"),
        (TOKENS, "allow_plaintext_tokens"),
        (replace(TOKENS, allow_anonymous=True), "allow_plaintext_tokens"),
        (replace(TOKENS, allow_plaintext_tokens=True), None),
        (replace(TLS, tokens_file=FILE), None),
        (replace(TLS, tls_client_ca_file=FILE), None),
        (replace(TLS, tls_client_ca_file=FILE, tokens_file=FILE), None),
        (Security(allow_anonymous=True), None),
    ],
)
def test_exposure_is_refused_by_the_settings_name(security: Security, needs: str | None) -> None:
    """The error names the setting that would allow it; loopback addresses are never refused."""
    for host in LOOPBACK:
        refuse_exposed(host, security)
    for host in EXPOSED:
        if needs is None:
            refuse_exposed(host, security)
        else:
            with pytest.raises(CannotServe, match=needs):
                refuse_exposed(host, security)


def test_serve_ends_with_one_line() -> None:
    """`serve` on an exposed address exits with 1 and an error without a traceback, before any worker is started."""
    done = CliRunner().invoke(app, ["serve", "--host", "0.0.0.0", "--local", "--port", "0"])
    assert done.exit_code == 1
    assert "allow_anonymous" in done.output
    assert "Traceback" not in done.output


LOCAL = ["localhost:7070", "127.0.0.1:7070", "[::1]:7070", "::1", "unix:/run/s", "unix:///run/s", "dns:///localhost:7"]
LOCAL += ["ipv4:127.0.0.1:7070", "ipv6:[::1]:7070", "unix-abstract:s"]
REMOTE = ["trainer-7:7070", "10.0.0.7:7070", "0.0.0.0:7070", "[fe80::1]:7070", "dns:///example.org:7070", "example.org"]
REMOTE += [
    "dns://8.8.8.8/localhost:7070",
    "xds:///localhost",
    "127.0.0.1.example.org:7070",
    "ipv4:127.0.0.1:1,10.0.0.7:1",
]


@pytest.mark.parametrize("address", LOCAL + REMOTE)
def test_a_client_sends_no_token_in_plaintext_off_this_machine(address: str, tmp_path: Path) -> None:
    """A token for a remote address is refused before anything is sent, unless TLS or allow_plaintext_token is set."""
    assert is_local(address) == (address in LOCAL)
    (tmp_path / "t").write_text("secret")
    for credentials in (Credentials("secret"), Credentials(token_file=tmp_path / "t")):
        if address in REMOTE:
            with pytest.raises(InvalidArgument, match="allow_plaintext_token") as caught:
                credentials.check(address)
            assert "secret" not in str(caught.value)
        else:
            credentials.check(address)
        replace(credentials, allow_plaintext_token=True).check(address)
        replace(credentials, tls=True).check(address)
    Credentials().check(address)


@pytest.mark.parametrize(
    "credentials, words",
    [
        ({"token": "a", "token_file": "b"}, "not both"),
        ({"token": ""}, "contains no valid token"),
        ({"token": "a b"}, "contains no valid token"),
        ({"token": "a\nb"}, "contains no valid token"),
        ({"token": "\u00e9"}, "contains no valid token"),
        ({"token_file": "/nowhere/at/all"}, "cannot read token_file /nowhere/at/all"),
        ({"token_file": "/"}, "cannot read token_file /: Is a directory"),
        ({"token_file": "/dev/zero"}, "token_file /dev/zero is larger than"),
        ({"token_file": "a\0b"}, "cannot read token_file a.b: embedded null byte"),
        ({"ca_file": "/dev/zero"}, "ca_file /dev/zero is larger than"),
        ({"ca_file": "a\0b"}, "cannot read ca_file a.b: embedded null byte"),
    ],
)
def test_what_is_no_token_is_refused_at_once(credentials: dict[str, str], words: str) -> None:
    """InvalidArgument names the field and does not quote the token."""
    with pytest.raises(InvalidArgument, match=words) as caught:
        shardloss.connect("localhost:1", **credentials)  # type: ignore[arg-type]
    assert "a b" not in str(caught.value)


def test_credentials_do_not_show_their_token() -> None:
    """The repr of credentials does not contain the token."""
    assert "secret" not in repr(Credentials("secret"))


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    """A changed token file is read again; an empty or missing one leaves the previous token in use."""
    path = tmp_path / "t"
    path.write_text("one\n")
    bearer = Bearer(Credentials(token_file=path))
    assert bearer.metadata() == (("authorization", "Bearer one"),)
    assert not bearer.renew()
    path.write_text("")
    assert not bearer.renew()
    path.unlink()
    assert not bearer.renew()
    path.write_text("second")
    assert bearer.renew()
    assert bearer.metadata() == (("authorization", "Bearer second"),)
    assert not Bearer(Credentials("one")).renew()
    assert Bearer(Credentials()).metadata() == ()

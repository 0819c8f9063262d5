"""Tokens files: their valid content, the commands that write them, and reading them again when they change."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from shardloss.errors import Unauthenticated
from shardloss_server.__main__ import app
from shardloss_server.access import token_files
from shardloss_server.access.gate import caller_by_token
from shardloss_server.access.grants import BadTokens, Grants, Role, digest_of, parse
from shardloss_server.access.token_files import escaped, init, read_grants, text_of, watched_grants, write
from shardloss_server.access.watched import Unreadable, Watched
from typer.testing import CliRunner, Result

DIGEST = digest_of(b"secret").hex()
OTHER = digest_of(b"another").hex()


def entry(name: str = '"a"', role: str = '"reader"', sha256: str = f'"{DIGEST}"', more: str = "") -> str:
    return f"[[token]]\nname = {name}\nrole = {role}\nsha256 = {sha256}\n{more}\n"


def test_a_whole_file_is_read() -> None:
    """Token and certificate entries are read, and expiry times may have any UTC offset."""
    certificate = '[[certificate]]\nname = "x.example.org"\nrole = "admin"\n'
    text = entry() + entry('"b"', '"admin"', f'"{OTHER}"', "expires = 2030-01-01T02:00:00+02:00") + certificate
    grants = parse(text)
    assert [(token.name, token.role) for token in grants.tokens] == [("a", Role.READER), ("b", Role.ADMIN)]
    assert grants.tokens[1].expires == datetime(2030, 1, 1, tzinfo=UTC)
    assert grants.certificate(["y", "x.example.org"]) is Role.ADMIN
    assert grants.certificate(["y"]) is None
    assert parse(entry(more='expires = "2030-01-01T00:00:00Z"')).tokens[0].expires == grants.tokens[1].expires


@pytest.mark.parametrize(
    "text, words",
    [
        ("[[token]", "not TOML"),
        ("tokens = 3", "'tokens' is unknown"),
        ("token = 3", "[[token]]"),
        ("token = [3]", "[[token]]"),
        (entry() + entry('"b"', more="note = 1", sha256=f'"{OTHER}"'), "[[token]] 2: 'note' is unknown"),
        (entry() + "[[token]]\nname = 'b'\nrole = 'reader'\n", "[[token]] 2: sha256 is missing"),
        (entry(role='"root"'), "[[token]] 1: role = 'root' must be one of reader, trainer, admin"),
        (entry(role="3"), "role = 3"),
        (entry(name="3"), "name = 3"),
        (entry(name='""'), "name = ''"),
        (entry(name='"a b"'), "name = 'a b'"),
        (entry(name='"../a"'), "name = '../a'"),
        (entry(sha256='"secret"'), "sha256 must be 64"),
        (entry(sha256=f'"{DIGEST.upper()}"'), "lower-case"),
        (entry(more="expires = 2030-01-01"), "expires = '2030-01-01'"),
        (entry(more="expires = 2030-01-01T00:00:00"), "expires = '2030-01-01 00:00:00'"),
        (entry(more='expires = "soon"'), "expires = 'soon'"),
        (entry() + entry(sha256=f'"{OTHER}"'), "[[token]] 2: its name is the same as that of [[token]] 1"),
        (entry() + entry('"b"'), "[[token]] 2: its sha256 is the same as that of [[token]] 1"),
        ('[[certificate]]\nname = "x"\n', "[[certificate]] 1: role is missing"),
        ('[[certificate]]\nname = "x"\nrole = "reader"\n' * 2, "[[certificate]] 2: its name"),
    ],
)
def test_what_is_wrong_is_named_by_its_entry(text: str, words: str) -> None:
    with pytest.raises(BadTokens) as caught:
        parse(text)
    assert words in str(caught.value)


def test_a_token_pasted_for_its_digest_is_not_shown() -> None:
    """A token pasted in place of its digest, an easy mistake, does not appear in the error, which is logged."""
    with pytest.raises(BadTokens) as caught:
        parse(entry(sha256='"my-very-secret"'))
    assert "my-very-secret" not in str(caught.value)


def test_a_token_ends_at_its_time() -> None:
    """A token is accepted before its expiry time and refused from that time on."""
    expires = datetime(2030, 1, 1, tzinfo=UTC)
    grants = parse(entry(more="expires = 2030-01-01T00:00:00Z"))
    assert caller_by_token(["Bearer secret"], grants, lambda: expires - timedelta(seconds=1)).role is Role.READER
    with pytest.raises(Unauthenticated, match="expired at 2030-01-01T00:00:00Z"):
        caller_by_token(["Bearer secret"], grants, lambda: expires)
    with pytest.raises(Unauthenticated, match="unknown"):
        caller_by_token(["Bearer secre"], grants)


def test_every_entry_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    """All digests are compared even after a match, each in constant time, so the duration reveals nothing."""
    grants, compared = parse(entry() + entry('"b"', sha256=f'"{OTHER}"')), []
    real = token_files.secrets.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: compared.append(a) or real(a, b))
    for secret in (b"secret", b"another", b"neither"):
        compared.clear()
        grants.token(secret)
        assert compared == [token.digest for token in grants.tokens]


def tokens(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["tokens", *map(str, arguments)])


def test_init_makes_its_folder(tmp_path: Path) -> None:
    """init creates the folder with mode 0700; if it cannot, it exits with 1 and a one-line error."""
    assert tokens("init", "--dir", tmp_path / "etc" / "shardloss").exit_code == 0
    assert stat.S_IMODE((tmp_path / "etc" / "shardloss").stat().st_mode) == 0o700
    (tmp_path / "file").touch()
    done = tokens("init", "--dir", tmp_path / "file" / "shardloss")
    assert (done.exit_code, done.output.count("\n")) == (1, 1)


def test_what_is_wrong_is_json_where_json_is_asked_for(tmp_path: Path) -> None:
    done = tokens("list", "--tokens-file", tmp_path / "none.toml", "--output", "json")
    assert done.exit_code == 1
    assert json.loads(done.stdout)["error"]["reason"] == "BAD_TOKENS"


def test_a_token_lasts_no_longer_than_dates_do(tmp_path: Path) -> None:
    given = ("--name", "x", "--role", "reader", "--tokens-file", tmp_path / "t.toml", "--out", tmp_path / "x")
    assert tokens("create", *given, "--expires-days", "1e9").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_init_makes_one_token_a_role_once(tmp_path: Path) -> None:
    """All files have mode 0600; repeating init changes nothing, and a revoked token stays revoked."""
    assert tokens("init", "--dir", tmp_path).exit_code == 0
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) == {"tokens.toml", "reader.token", "trainer.token", "admin.token"}
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o600}
    grants = read_grants(tmp_path / "tokens.toml")
    for word in ("reader", "trainer", "admin"):
        token = files[f"{word}.token"].strip()
        assert len(token) >= 43
        found = grants.token(token)
        assert found is not None
        assert (found.name, found.role.word) == (word, word)
    assert tokens("init", "--dir", tmp_path).exit_code == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    token_files.revoke(tmp_path / "tokens.toml", "reader")
    assert "nothing to do" in tokens("init", "--dir", tmp_path).output
    assert [token.name for token in read_grants(tmp_path / "tokens.toml").tokens] == ["trainer", "admin"]


def test_an_init_that_was_cut_off_is_finished(tmp_path: Path) -> None:
    """init writes the tokens file last and keeps a token that an interrupted run created."""
    write(tmp_path / "admin.token", "of-before\n", replace=False)
    assert len(init(tmp_path)) == 3
    found = read_grants(tmp_path / "tokens.toml").token(b"of-before")
    assert found is not None
    assert found.role is Role.ADMIN


def test_create_list_and_revoke(tmp_path: Path) -> None:
    """A token can be created, listed and revoked, and no command prints it."""
    file, out = tmp_path / "t.toml", tmp_path / "x.token"
    made = tokens(
        "create", "--name", "x", "--role", "trainer", "--expires-days", 2, "--tokens-file", file, "--out", out
    )
    assert made.exit_code == 0
    secret = out.read_text().strip()
    assert secret not in made.output
    assert secret not in file.read_text()
    with file.open("a") as comment:
        comment.write("# of mine\n")
    assert (
        tokens("create", "--name", "y", "--role", "admin", "--tokens-file", file, "--out", tmp_path / "y").exit_code
        == 0
    )
    assert "# of mine" in file.read_text()
    listed = json.loads(tokens("list", "--tokens-file", file, "--output", "json").output)
    assert [(each["name"], each["role"], each["expired"]) for each in listed] == [
        ("x", "trainer", False),
        ("y", "admin", False),
    ]
    until = datetime.fromisoformat(listed[0]["expires"]) - datetime.now(UTC)
    assert timedelta(days=1.9) < until <= timedelta(days=2)
    assert tokens("revoke", "--name", "x", "--tokens-file", file).exit_code == 0
    assert read_grants(file).token(secret.encode()) is None
    assert "trainer" not in tokens("list", "--tokens-file", file).output


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["create", "--name", "x", "--role", "root"], "--role root must be one of reader, trainer, admin"),
        (["create", "--name", "../x", "--role", "reader"], "'../x'"),
        (["create", "--name", "there", "--role", "reader"], "already has a token named there"),
        (["revoke", "--name", "x"], "no token named x"),
    ],
)
def test_a_command_that_cannot_says_why_and_changes_nothing(tmp_path: Path, arguments: list[str], words: str) -> None:
    file, out = tmp_path / "t.toml", tmp_path / "x.token"
    tokens("create", "--name", "there", "--role", "reader", "--tokens-file", file, "--out", tmp_path / "there")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    done = tokens(*arguments, "--tokens-file", file, *(["--out", out] if arguments[0] == "create" else []))
    assert done.exit_code == 1
    assert words in done.output
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    """`tokens create` refuses an output file that exists, which may hold another token."""
    out = tmp_path / "x.token"
    out.write_text("mine")
    done = tokens("create", "--name", "x", "--role", "reader", "--tokens-file", tmp_path / "t.toml", "--out", out)
    assert done.exit_code == 1
    assert out.read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["x.token"]


def test_an_entry_is_not_written_where_its_token_cannot_be(tmp_path: Path) -> None:
    """Without a writable tokens file, neither an entry nor a token is written."""
    absent = tmp_path / "absent" / "t.toml"
    done = tokens("create", "--name", "x", "--role", "reader", "--tokens-file", absent, "--out", tmp_path / "x")
    assert done.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_any_name_of_a_certificate_survives_a_revocation() -> None:
    """A rewritten file keeps every quoted name, including quotes, backslashes, newlines and non-ASCII characters."""
    name = 'a"b\\c\n\u00e9\U0001f600'
    grants = parse(f'[[certificate]]\nname = "{escaped(name)}"\nrole = "reader"\n')
    assert parse(text_of(grants)).certificate([name]) is Role.READER


def test_a_world_readable_file_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokens file that others can read is reported in the log, and its tokens stay valid."""
    init(tmp_path)
    os.chmod(tmp_path / "tokens.toml", 0o644)
    assert len(watched_grants(tmp_path / "tokens.toml").value().tokens) == 3
    assert "mode 644" in caplog.text


def test_an_empty_file_lets_nobody_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.toml").write_text("")
    assert watched_grants(tmp_path / "t.toml").value() == Grants()
    assert "every call is refused" in caplog.text


def test_a_file_is_looked_at_no_more_than_its_interval_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A watched file is checked at most once per interval, not on every call."""
    path, now = tmp_path / "f", [100.0]
    monkeypatch.setattr("shardloss_server.access.watched.time.monotonic", lambda: now[0])
    path.write_text("1")
    watched = Watched([path], path.read_text, 1.0)
    path.write_text("22")
    assert watched.value() == "1"
    now[0] += 1.0
    assert watched.value() == "22"


def test_a_file_that_goes_away_or_is_wrong_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that disappears or is malformed leaves the previous content in use, and is logged once per change."""
    path = tmp_path / "f"

    def read() -> int:
        try:
            return int(path.read_text())
        except (OSError, ValueError) as error:
            raise Unreadable(f"{path} is wrong: {error}") from None

    path.write_text("1")
    watched = Watched([path], read, 0.0)
    with caplog.at_level(logging.ERROR):
        path.write_text("many")
        assert [watched.value() for _ in range(3)] == [1, 1, 1]
        assert caplog.text.count("previous content stays in use") == 1
        path.unlink()
        assert watched.value() == 1
        assert caplog.text.count("previous content stays in use") == 2
    path.write_text("444")
    assert watched.value() == 444


def test_offsets_are_written_as_utc() -> None:
    """Expiry times are written in UTC, so a rewritten file gives the same time."""
    there = datetime(2030, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    text = text_of(parse(entry(more=f"expires = {there.isoformat()}")))
    assert "expires = 2030-01-01T00:00:00Z" in text
    assert parse(text).tokens[0].expires == there


REASONS = (errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EPERM, errno.EIO)


@pytest.mark.parametrize("number", REASONS, ids=[errno.errorcode[number] for number in REASONS])
def test_a_file_that_cannot_be_written_is_told_in_one_line_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """On a read-only volume even the clean-up fails; it must not hide why. Nothing is left behind."""
    init(tmp_path)
    before = sorted(tmp_path.iterdir())
    real = os.open

    def refusing(path: object, flags: int, *args: int) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), path)
        return real(path, flags, *args)  # type: ignore[arg-type]

    def unlinked(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(os, "open", refusing)
    monkeypatch.setattr(Path, "unlink", unlinked)
    file, out = tmp_path / "tokens.toml", tmp_path / "x.token"
    for done in (
        tokens("create", "--name", "x", "--role", "reader", "--tokens-file", file, "--out", out),
        tokens("revoke", "--name", "reader", "--tokens-file", file),
    ):
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.exception
        assert os.strerror(number) in done.output
        assert "Errno" not in done.output
    assert sorted(tmp_path.iterdir()) == before


def a_folder(path: Path) -> None:
    path.mkdir()


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def another_encoding(path: Path) -> None:
    path.write_bytes("token".encode("utf-16"))


def a_loop(path: Path) -> None:
    path.symlink_to(path)


def a_huge_file(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


@pytest.mark.parametrize("made", [a_folder, a_pipe, a_device, another_encoding, a_loop, a_huge_file])
def test_a_tokens_file_that_is_none_is_told_in_one_line(tmp_path: Path, made: Callable[[Path], None]) -> None:
    """None of them is waited for, read without end, or overwritten."""
    file = tmp_path / "t.toml"
    made(file)
    for done in (
        tokens("list", "--tokens-file", file),
        tokens("revoke", "--name", "x", "--tokens-file", file),
        tokens("create", "--name", "x", "--role", "reader", "--tokens-file", file, "--out", tmp_path / "x"),
    ):
        assert (done.exit_code, done.output.count("\n")) == (1, 1), done.exception
        assert str(file) in done.output or os.path.realpath(file) in done.output
    assert [path.name for path in tmp_path.iterdir()] == ["t.toml"]


@pytest.mark.parametrize("out", ["folder", "file/x.token", "absent/x.token", "x" * 300, "t.toml"])
def test_a_token_that_cannot_be_written_there_is_not_created(tmp_path: Path, out: str) -> None:
    """Neither over a folder, nor in a place that does not exist, nor into the tokens file itself."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    file = tmp_path / "t.toml"
    done = tokens("create", "--name", "x", "--role", "reader", "--tokens-file", file, "--out", tmp_path / out)
    assert (done.exit_code, done.output.count("\n")) == (1, 1), done.exception
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_rewritten_tokens_file_keeps_its_owner_mode_and_links(tmp_path: Path) -> None:
    """A server that runs as another user still reads it, through a symbolic link too: a revoked token is refused."""
    init(tmp_path)
    file, link = tmp_path / "tokens.toml", tmp_path / "link" / "tokens.toml"
    link.parent.mkdir()
    link.symlink_to("../tokens.toml")
    os.chmod(file, 0o640)
    if os.geteuid() == 0:
        os.chown(file, 12345, 54321)
    before = file.stat()
    grants = watched_grants(file)
    assert tokens("revoke", "--name", "reader", "--tokens-file", link).exit_code == 0
    assert link.is_symlink()
    after = file.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    assert [token.name for token in grants.latest().tokens] == ["trainer", "admin"]


def test_a_folder_that_another_command_holds_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_files, "LOCK_S", 0.1)
    init(tmp_path)
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    done = tokens("revoke", "--name", "reader", "--tokens-file", tmp_path / "tokens.toml")
    os.close(held)
    assert done.exit_code == 1
    assert "another command has been writing to" in done.output
    assert len(read_grants(tmp_path / "tokens.toml").tokens) == 3


def test_a_token_file_is_utf_8_whatever_the_locale_says(tmp_path: Path) -> None:
    """Comments of any language survive the next `tokens create`."""
    file = tmp_path / "t.toml"
    file.write_text("# café \u4ee4\u724c\n", encoding="utf-8")
    arguments = ["create", "--name", "x", "--role", "reader", "--tokens-file", "t.toml", "--out", "x"]
    done = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "shardloss_server", "tokens", *arguments],
        cwd=tmp_path,
        env={**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "café" in file.read_text(encoding="utf-8")


@pytest.mark.parametrize("days", ["0", "-1", "nan", "1e-400"])
def test_a_token_that_would_have_ended_is_not_created(tmp_path: Path, days: str) -> None:
    given = ("--name", "x", "--role", "reader", "--tokens-file", tmp_path / "t.toml", "--out", tmp_path / "x")
    done = tokens("create", *given, "--expires-days", days)
    assert done.exit_code in (1, 2)
    assert "--expires-days" in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "ends_in, words",
    [
        (timedelta(days=3), "in 3 d"),
        (timedelta(minutes=61), "in 1 h"),
        (-timedelta(seconds=3700), "1 h ago"),
        (-timedelta(days=40), "40 d ago"),
    ],
)
def test_when_a_token_ends_or_ended_is_told_forwards(tmp_path: Path, ends_in: timedelta, words: str) -> None:
    """No duration is negative: neither in `tokens list` nor in the error of a call with an expired token."""
    file, now = tmp_path / "t.toml", datetime.now(UTC)
    token_files.create(file, tmp_path / "x", "x", Role.READER, now + ends_in)
    listed = " ".join(tokens("list", "--tokens-file", file).output.replace("│", " ").split())
    assert words in listed
    if ends_in < timedelta():
        with pytest.raises(Unauthenticated, match=f"{words}: get a new one"):
            caller_by_token([f"Bearer {(tmp_path / 'x').read_text().strip()}"], read_grants(file))

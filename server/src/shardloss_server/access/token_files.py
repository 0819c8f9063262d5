"""Token files as the `tokens` commands write them: atomically, and readable only by their owner."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from shardloss_server.access.grants import TOKEN_NAME, BadTokens, Grants, Role, Token, digest_of, parse
from shardloss_server.access.watched import Watched, warn_where_others_read

SECRET_BYTES = 32
HEADER = "# Digests of the accepted tokens. Written by `shardloss-server tokens`; see docs/security.md.\n"
INIT_FILE = "tokens.toml"
RELOAD_S = 1.0
EVERYONE_READS = 0o004
log = logging.getLogger(__name__)


def read_grants(path: Path) -> Grants:
    """Read a tokens file.

    Raises:
        BadTokens: the file cannot be read or is invalid; the message names it.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BadTokens(f"cannot read the tokens file {path}: {error}") from None
    except BadTokens as error:
        raise BadTokens(f"the tokens file {path} is invalid: {error}") from None


def watched_grants(path: Path) -> Watched[Grants]:
    """Watch a tokens file, which is checked for changes at most once per second.

    Raises:
        BadTokens: as in `read_grants`.
    """

    def read() -> Grants:
        warn_where_others_read(path, EVERYONE_READS, "the tokens file")
        grants = read_grants(path)
        if not grants.tokens and not grants.certificates:
            log.warning("the tokens file %s is empty: every call is refused", path)
        return grants

    return Watched([path], read, RELOAD_S)


def create(tokens_file: Path, out: Path, name: str, role: Role, expires: datetime | None) -> None:
    """Create a token: write it to `out`, which must not exist, and append its entry to the tokens file.

    Raises:
        BadTokens: the name is in use or malformed, or a file cannot be written; nothing was changed.
    """
    if not TOKEN_NAME.fullmatch(name):
        raise BadTokens(f"the name {name!r} must be at most 64 letters, digits and ._@-")
    with alone(tokens_file.parent):
        there = tokens_file.exists()
        if there and any(token.name == name for token in read_grants(tokens_file).tokens):
            raise BadTokens(f"{tokens_file} already has a token named {name}: revoke it, or choose another name")
        before = tokens_file.read_text(encoding="utf-8") if there else HEADER
        token = write_secret(out, name, role, expires)
        try:
            write(tokens_file, f"{before.rstrip()}\n\n{entry_text(token)}", replace=True)
        except BaseException:
            out.unlink()
            raise


def revoke(tokens_file: Path, name: str) -> Token:
    """Remove a token's entry; the file is rewritten, and its comments are lost.

    Raises:
        BadTokens: the file has no token of that name, or cannot be written.
    """
    with alone(tokens_file.parent):
        grants = read_grants(tokens_file)
        found = next((token for token in grants.tokens if token.name == name), None)
        if found is None:
            raise BadTokens(f"{tokens_file} has no token named {name}; `tokens list` shows all tokens")
        rest = Grants(tuple(token for token in grants.tokens if token is not found), grants.certificates)
        write(tokens_file, text_of(rest), replace=True)
        return found


def init(folder: Path) -> list[Path]:
    """Create one token per role and their tokens file in a folder; return the created files. Idempotent.

    The folder is created if absent. The tokens file is written last; if it exists, nothing is created, so that revoked
    tokens stay revoked.

    Raises:
        BadTokens: a file cannot be written, or an existing token cannot be read.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadTokens(f"cannot create the folder {folder}: {error}") from None
    with alone(folder):
        tokens_file, made, tokens = folder / INIT_FILE, [], []
        if tokens_file.exists():
            return []
        for role in Role:
            path = folder / f"{role.word}.token"
            if path.exists():  # left by an interrupted init
                tokens.append(Token(role.word, role, digest_of(read_secret(path))))
            else:
                tokens.append(write_secret(path, role.word, role, None))
                made.append(path)
        write(tokens_file, text_of(Grants(tuple(tokens))), replace=False)
        return [*made, tokens_file]


def read_secret(path: Path) -> bytes:
    """Return the token in a token file, which contains nothing else.

    Raises:
        BadTokens: the file cannot be read or is empty.
    """
    try:
        secret = path.read_bytes().strip()
    except OSError as error:
        raise BadTokens(f"cannot read the token file {path}: {error}") from None
    if not secret:
        raise BadTokens(f"the token file {path} is empty: remove it")
    return secret


def write_secret(path: Path, name: str, role: Role, expires: datetime | None) -> Token:
    """Write a new random token to its own file, and return its entry."""
    secret = secrets.token_urlsafe(SECRET_BYTES)
    write(path, secret + "\n", replace=False)
    return Token(name, role, digest_of(secret.encode()), expires)


def text_of(grants: Grants) -> str:
    """Return the text of a whole tokens file."""
    certificates = [
        f'[[certificate]]\nname = "{escaped(name)}"\nrole = "{role.word}"\n'
        for name, role in grants.certificates.items()
    ]
    return "\n".join([HEADER, *(entry_text(token) for token in grants.tokens), *certificates])


def escaped(text: str) -> str:
    """Return text escaped for a TOML string, since the names of certificates may contain anything."""
    return "".join(
        char if char.isprintable() and char not in '"\\' and ord(char) < 0x80 else f"\\U{ord(char):08x}"
        for char in text
    )


def entry_text(token: Token) -> str:
    """Return the text of one [[token]] entry."""
    lines = ["[[token]]", f'name = "{token.name}"', f'role = "{token.role.word}"', f'sha256 = "{token.digest.hex()}"']
    if token.expires is not None:
        lines.append(f"expires = {token.expires:%Y-%m-%dT%H:%M:%SZ}")
    return "\n".join(lines) + "\n"


def write(path: Path, text: str, *, replace: bool) -> None:
    """Write a file atomically, with mode 0600; without replace it must not exist.

    Raises:
        BadTokens: the file exists, or its folder cannot be written to.
    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            unfinished.replace(path)
        else:
            os.link(unfinished, path)
    except FileExistsError:
        raise BadTokens(f"{path} already exists and is not overwritten") from None
    except OSError as error:
        raise BadTokens(f"cannot write {path}: {error}") from None
    finally:
        with suppress(FileNotFoundError):
            unfinished.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other command writes in it at the same time.

    Raises:
        BadTokens: the folder cannot be opened.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise BadTokens(f"cannot open the folder {folder}: {error}") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

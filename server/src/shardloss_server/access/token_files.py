"""Token files as the `tokens` commands write them: atomically, and readable only by their owner."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from shardloss_server.access.grants import TOKEN_NAME, BadTokens, Grants, Role, Token, digest_of, parse
from shardloss_server.access.watched import Unreadable, Watched, content_of, text_in, warn_where_others_read

SECRET_BYTES = 32
HEADER = "# Digests of the accepted tokens. Written by `shardloss-server tokens`; see docs/security.md.\n"
INIT_FILE = "tokens.toml"
RELOAD_S = 1.0
LOCK_S, LOCK_AGAIN_S = 10.0, 0.05
DO = {errno.EROFS: ": run this where the folder is writable (docs/deploy.md and docs/kubernetes.md say how)"}
EVERYONE_READS = 0o004
log = logging.getLogger(__name__)


def read_grants(path: Path) -> Grants:
    """Read a tokens file.

    Raises:
        BadTokens: the file cannot be read or is invalid; the message names it.
    """
    try:
        return parse(text_in(path, "the tokens file"))
    except BadTokens as error:
        raise BadTokens(f"the tokens file {path} is invalid: {error}") from None
    except Unreadable as error:
        raise BadTokens(str(error)) from None


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
    if os.path.realpath(tokens_file) == os.path.realpath(out):
        raise BadTokens(f"{out} is the tokens file: the token itself needs a file of its own")
    with alone(tokens_file) as file:
        there = os.path.exists(file)
        if there and any(token.name == name for token in read_grants(file).tokens):
            raise BadTokens(f"{tokens_file} already has a token named {name}: revoke it, or choose another name")
        before = text_in(file, "the tokens file") if there else HEADER
        token = write_secret(out, name, role, expires)
        try:
            write(file, f"{before.rstrip()}\n\n{entry_text(token)}", replace=True)
        except BaseException:
            with suppress(OSError):
                out.unlink()
            raise


def revoke(tokens_file: Path, name: str) -> Token:
    """Remove a token's entry; the file is rewritten, and its comments are lost.

    Raises:
        BadTokens: the file has no token of that name, or cannot be written.
    """
    with alone(tokens_file) as file:
        grants = read_grants(file)
        found = next((token for token in grants.tokens if token.name == name), None)
        if found is None:
            raise BadTokens(f"{tokens_file} has no token named {name}; `tokens list` shows all tokens")
        rest = Grants(tuple(token for token in grants.tokens if token is not found), grants.certificates)
        write(file, text_of(rest), replace=True)
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
        raise cannot(f"create the folder {folder}", error) from None
    with alone(folder / INIT_FILE) as tokens_file:
        made, tokens = [], []
        if os.path.exists(tokens_file):
            return []
        for role in Role:
            path = folder / f"{role.word}.token"
            if os.path.exists(path):  # left by an interrupted init
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
        secret = content_of(path, "the token file").strip()
    except Unreadable as error:
        raise BadTokens(str(error)) from None
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
    """Write a file atomically: a new one with mode 0600, a replaced one with the owner and mode that it had.

    Raises:
        BadTokens: without replace, the file exists; or it cannot be written.
    """
    unfinished = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            if replace:
                own_like(path, file.fileno())
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        if replace:
            unfinished.replace(path)
        else:
            os.link(unfinished, path)
    except FileExistsError:
        raise BadTokens(f"{path} already exists and is not overwritten") from None
    except OSError as error:
        raise cannot(f"write {path}", error) from None
    finally:
        with suppress(OSError):  # in a folder that cannot be written to, nothing was left
            unfinished.unlink()


def own_like(path: Path, descriptor: int) -> None:
    """Give an open file the owner and mode of the one that it will replace, whose server must be able to read it."""
    with suppress(FileNotFoundError):
        wanted, found = os.stat(path), os.fstat(descriptor)
        if (wanted.st_uid, wanted.st_gid) != (found.st_uid, found.st_gid):
            os.fchown(descriptor, wanted.st_uid, wanted.st_gid)
        os.fchmod(descriptor, wanted.st_mode & 0o777)


def cannot(what: str, error: OSError) -> BadTokens:
    """Return the error of a file that cannot be accessed, with its reason and what to do."""
    return BadTokens(f"cannot {what}: {error.strerror}{DO.get(error.errno or 0, '')}")


@contextmanager
def alone(tokens_file: Path) -> Iterator[Path]:
    """Lock the folder of a tokens file against other commands; yield the file's path, with symbolic links followed.

    Raises:
        BadTokens: the folder cannot be opened, or another command holds the lock for LOCK_S.
    """
    real = Path(os.path.realpath(tokens_file))
    try:
        descriptor = os.open(real.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise cannot(f"open the folder {real.parent}", error) from None
    try:
        lock(descriptor, real.parent)
        yield real
    finally:
        os.close(descriptor)


def lock(descriptor: int, folder: Path) -> None:
    """Lock an open folder until it is closed."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if not isinstance(error, BlockingIOError):
                raise cannot(f"lock the folder {folder}", error) from None
        if time.monotonic() >= deadline:
            raise BadTokens(f"another command has been writing to {folder} for {LOCK_S:.0f} s: try again")
        time.sleep(LOCK_AGAIN_S)

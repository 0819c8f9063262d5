"""A server's folder in TMPDIR: whose it is, and which folders the next server removes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from shardloss_server.cluster import folder as module
from shardloss_server.cluster.folder import LOCK, MARK, OwnFolder, remove_abandoned
from shardloss_server.config import CannotServe

WAIT = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"]


@pytest.fixture
def tmpdir_of_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A TMPDIR that is a relative link."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", "link")
    return tmp_path / "real"


def abandoned(tmpdir: Path) -> Path:
    """Return a folder as a killed server leaves it."""
    left = tmpdir / "shardloss-left"
    left.mkdir()
    (left / LOCK).touch()
    return left


def test_a_folder_that_no_server_holds_is_removed_with_its_processes(tmpdir_of_links: Path) -> None:
    """The processes are found whatever links lead to TMPDIR; a folder that is held stays, and so do its processes."""
    held = OwnFolder()
    left = abandoned(tmpdir_of_links)
    with (
        subprocess.Popen(WAIT, stdin=-1, stdout=-1, env={**os.environ, MARK: str(left)}) as orphan,
        subprocess.Popen(WAIT, stdin=-1, stdout=-1, env={**os.environ, MARK: str(held.path)}) as ours,
    ):
        assert orphan.stdout is not None
        assert ours.stdout is not None
        assert orphan.stdout.readline() == ours.stdout.readline() == b"\n"
        remove_abandoned()
        assert orphan.wait(60) == -9
        assert ours.poll() is None
        assert list(tmpdir_of_links.iterdir()) == [held.path]
        held.remove()
        held.remove()
        assert ours.wait(60) == -9
    assert list(tmpdir_of_links.iterdir()) == []


def test_links_and_folders_of_other_users_are_left_alone(
    tmpdir_of_links: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everybody may create shardloss-* in a shared TMPDIR, as a link to another folder or with a link as its lock."""
    elsewhere = tmp_path / "precious"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    (tmpdir_of_links / "shardloss-link").symlink_to(elsewhere)
    (tmpdir_of_links / "shardloss-lock").mkdir()
    (tmpdir_of_links / "shardloss-lock" / LOCK).symlink_to(elsewhere / LOCK)
    foreign = abandoned(tmpdir_of_links)
    me = os.geteuid()
    monkeypatch.setattr(module.os, "geteuid", lambda: me + 1)
    remove_abandoned()
    assert foreign.is_dir()
    monkeypatch.setattr(module.os, "geteuid", lambda: me)
    remove_abandoned()
    assert not foreign.exists()
    assert (elsewhere / LOCK).exists()
    assert len(list(tmpdir_of_links.iterdir())) == 2


def test_a_tmpdir_without_locks_is_named(tmpdir_of_links: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line names TMPDIR and the reason; so does the one about a machine with no temporary folder at all."""

    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    with pytest.raises(CannotServe, match=r"TMPDIR = .*real cannot hold .* No locks available"):
        OwnFolder()
    assert list(tmpdir_of_links.iterdir()) == []

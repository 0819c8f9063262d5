"""The wheels of both packages work in an empty environment, outside the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1200.0
Run = Callable[..., str]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels, built from copies because a build writes into its source tree."""
    out = tmp_path_factory.mktemp("wheels")
    for package in ("client", "server"):
        source = tmp_path_factory.mktemp(package) / package
        shutil.copytree(ROOT / package, source, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "build"))
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--wheel-dir", str(out), str(source)], check=True, timeout=PATIENCE_S)
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return a function that runs a program of a new environment in an empty folder and returns its output."""
    folder = tmp_path_factory.mktemp("outside")
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True, timeout=PATIENCE_S)
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def run(program: str, *arguments: str) -> str:
        command = [str(folder / "venv/bin" / program), *arguments]
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
        if done.returncode and "Could not find a version" in done.stderr and "connection" in done.stderr.lower():
            pytest.skip("no package registry can be reached")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    run.folder = folder  # type: ignore[attr-defined]
    return run


def install(run: Run, wheels: Path, *what: str) -> None:
    options = ("--quiet", "--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt"))
    run("python", "-m", "pip", "install", *options, "--find-links", str(wheels), *what)


@pytest.mark.parametrize("package", ["shardloss", "shardloss_server"])
def test_a_wheel_says_what_an_index_shows(wheels: Path, package: str) -> None:
    """A wheel has a licence and its file, URLs, classifiers, its own README, and type information."""
    (path,) = wheels.glob(f"{package}-*.whl")
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        metadata = wheel.read(next(name for name in names if name.endswith("/METADATA"))).decode()
    head, _, readme = metadata.partition("\n\n")
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert f"{package}/py.typed" in names
    assert "License-Expression: Apache-2.0" in head
    assert {url.split(",")[0] for url in re.findall(r"Project-URL: (.*)", head)} >= {"Homepage", "Changelog", "Issues"}
    assert len(re.findall(r"^Classifier: ", head, re.M)) >= 5
    assert len(readme.splitlines()) > 10


def test_the_client_needs_neither_ray_nor_torch(run: Run, wheels: Path) -> None:
    """The client imports without Ray and torch; a head's error names the extra that installs torch."""
    install(run, wheels, "shardloss")
    code = "import shardloss, importlib.util as u; assert not u.find_spec('ray') and not u.find_spec('torch')"
    run("python", "-c", code)
    code = "import shardloss; object.__new__(shardloss.Table).softmax()"
    done = subprocess.run(
        [str(run.folder / "venv/bin/python"), "-c", code],  # type: ignore[attr-defined]
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert "pip install 'shardloss[torch]'" in done.stderr


def test_the_trainer_of_the_readme_runs_and_type_checks(run: Run, wheels: Path) -> None:
    """The README's trainer runs against a server from the other wheel; mypy --strict infers its loss as a Tensor."""
    install(run, wheels, "shardloss[torch,cli]", "shardloss-server", "mypy")
    folder: Path = run.folder  # type: ignore[attr-defined]
    ready = folder / "ready"
    options = ("serve", "--local", "--port", "0", "--admin-port", "0", "--ready-file", str(ready))
    with subprocess.Popen([str(folder / "venv/bin/shardloss-server"), *options], cwd=folder) as server:
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not ready.exists():
                assert server.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.1)
            (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
            trainer = folder / "trainer.py"
            trainer.write_text(code.replace("127.0.0.1:7070", ready.read_text()))
            assert "exact loss" in run("python", "trainer.py")
            assert "words" in run("shardloss", "table", "list", "--address", ready.read_text())
        finally:
            server.terminate()
    assert server.returncode == 0
    trainer.write_text(code + "\nreveal_type(loss)\n")
    assert 'Revealed type is "torch._tensor.Tensor"' in run("mypy", "--strict", "trainer.py")

"""The README is true: its example runs, and what it names is there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from shardloss_server.rpc.serve import Server

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_trainer_example_runs_as_it_stands(local_server: Server, capsys) -> None:
    """Only the address is replaced by the test server's."""
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(example.strip().splitlines()) <= 16
    exec(compile(example.replace("127.0.0.1:7070", local_server.address), "README.md", "exec"), {})
    assert 5.0 < float(capsys.readouterr().out) < 20.0  # log(50,000) = 10.8


def test_the_examples_for_tensorflow_users_run_as_they_stand(local_server: Server, capsys) -> None:
    """One after the other, as a reader would type them."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs/tensorflow.md").read_text(), re.S)
    assert len(examples) == 2
    code = "".join(examples).replace("127.0.0.1:7070", local_server.address)
    exec(compile(code, "docs/tensorflow.md", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_every_make_target_and_link_is_there() -> None:
    """Commands and files that the README names exist."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"make ([a-z]+(?:-[a-z]+)*)", README)) - {"nothing"} <= targets
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_golden_family_is_in_the_docs() -> None:
    """docs/frameworks.md has a line for each, and the files it names load it."""
    index = json.loads((ROOT / "tests/golden/data/index.json").read_text())
    lines = re.findall(r"^\| `(\w+)` \| .* \| (`test_\w+\.py`.*?) \|", (ROOT / "docs/frameworks.md").read_text(), re.M)
    assert sorted(family for family, _ in lines) == sorted({case["family"] for case in index})
    for family, where in lines:
        for name in re.findall(r"`(\w+\.py)`", where):
            assert f'"{family}"' in (ROOT / "tests/golden" / name).read_text(), (family, name)


def test_every_link_of_the_docs_is_there() -> None:
    """Relative to the page."""
    for page in (*(ROOT / "docs").rglob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "proto/README.md"):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), (page.name, link)


def test_every_adr_is_short() -> None:
    """An ADR has at most 60 lines."""
    for path in (ROOT / "docs/adr").glob("*.md"):
        assert len(path.read_text().splitlines()) <= 60, path.name

"""The pages are correct: their examples run and print the output shown, and everything they name exists."""

from __future__ import annotations

import io
import json
import re
import runpy
import shlex
import subprocess
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import shardloss
import yaml
from rich.console import Console
from shardloss_server.rpc.serve import Server

from examples.cities import report
from examples.cities.evaluate import Figures

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def blocks(page: str) -> list[tuple[str, str]]:
    """Return (language, text) of each fenced block of a page."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


def run(code: str, server: Server) -> str:
    """Run a page's code against a server of the tests and return what it prints."""
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code.replace("127.0.0.1:7070", server.address), "page", "exec"), {})
    return printed.getvalue()


def assert_same_output(printed: str, shown: str, tolerance: float) -> None:
    """Assert that texts are equal and numbers differ by at most `tolerance`: rounding differs between processors."""
    assert NUMBER.sub("#", printed).split() == NUMBER.sub("#", shown).split()
    for found, expected in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(found) == pytest.approx(float(expected), abs=tolerance), printed


@pytest.fixture
def without(client: shardloss.LossClient) -> None:
    """Delete the tables that earlier runs created under the examples' names."""
    for name in ("words", "tour"):
        if name in {table.name for table in client.list_tables()}:
            client.delete_table(name)


def test_the_trainer_of_the_readme_prints_what_it_shows(local_server: Server, without: None) -> None:
    """The README's trainer has at most 20 lines of code and prints the output shown."""
    (code,) = [text for language, text in blocks("README.md") if language == "python"]
    shown = [text for language, text in blocks("README.md") if language == "text"][1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    assert_same_output(run(code, local_server), shown, tolerance=0.15)


def test_the_tour_prints_what_it_shows(local_server: Server, without: None) -> None:
    """The tour's example prints the output shown, and the page has at most 60 lines."""
    assert len((ROOT / "docs/tour.md").read_text().splitlines()) <= 60
    (_, code), (_, shown) = blocks("docs/tour.md")
    assert_same_output(run(code, local_server), shown, tolerance=0)


def test_every_file_of_the_tour_exists() -> None:
    for name in re.findall(r"`([\w/]+\.py|[\w/]+/)`", (ROOT / "docs/tour.md").read_text()):
        if name.startswith(("client/", "server/")):
            assert (ROOT / name).exists(), name
        else:
            tops = ("client/src/shardloss", "server/src/shardloss_server")
            assert any((ROOT / top / name).exists() for top in tops), name


def test_the_table_of_the_demo_is_what_it_prints() -> None:
    """The demo's own report, given the figures that the README shows, prints the README's table."""
    shown = next(text for language, text in blocks("README.md") if language == "text")
    figures = {}
    for title, *cells in re.findall(r"│ (\w+) +│ (.+?) │ (.+?) │ (.+?) │ (.+?) │ (.+?) │", shown):
        nll, hit_at_1, hit_at_10, mrr = map(float, cells[:4])
        figures[title] = Figures(nll, hit_at_1, hit_at_10, mrr, float(cells[4]) if cells[4].strip() else None)
    assert list(figures) == ["before", "after", "baseline"]
    num_names, num_classes = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", shown)[:2])
    printed = io.StringIO()
    report.print_figures(Console(file=printed, width=80), figures, num_names, num_classes)
    assert [line.strip() for line in printed.getvalue().splitlines()] == [line.strip() for line in shown.splitlines()]


@pytest.mark.parametrize("page", ["README.md", "examples/README.md", "client/README.md", "server/README.md"])
def test_every_shell_line_names_what_exists(page: str) -> None:
    """Every make target, program, script and package in a page's shell lines exists."""
    for line in "".join(text for language, text in blocks(page) if language == "sh").splitlines():
        words = shlex.split(line, comments=True)
        if words[0] == "make":
            done = subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, capture_output=True, check=False)
            assert done.returncode == 0, line
        elif words[:2] == ["docker", "compose"]:
            services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
            profiles = {profile for service in services.values() for profile in service.get("profiles", ())}
            given = dict(pairwise(words))
            assert given.get("--profile", "demo") in profiles, line
            assert given.get("--scale", "worker=1").split("=")[0] in services, line
        elif words[:2] == ["pip", "install"]:
            assert re.fullmatch(r"shardloss(-server)?(\[\w+\])?", words[2]), line
        else:  # the project's programs: tests/architecture/test_names.py checks their commands and options
            assert words[0].removeprefix(".venv/bin/") in ("shardloss-server", "shardloss", "python"), line
            assert all((ROOT / word).exists() for word in words if word.endswith(".py")), line


def test_the_first_example_learns(local_server: Server, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """examples/train.py approaches the lowest possible loss and predicts the words of its training data."""
    monkeypatch.setenv("SHARDLOSS_ADDRESS", local_server.address)
    runpy.run_path(str(ROOT / "examples/train.py"))
    *steps, last = capsys.readouterr().out.splitlines()
    exact = [float(NUMBER.findall(line)[-1]) for line in steps]
    assert exact[0] == pytest.approx(9.9, abs=0.3)
    assert exact[-1] < 2.0  # the lowest possible loss is log(3) = 1.10
    found, expected = re.findall(r"\[.*?\]", last)
    assert found == expected
    assert len((ROOT / "examples/train.py").read_text().splitlines()) <= 60


def test_the_examples_for_tensorflow_users_run_as_they_stand(local_server: Server) -> None:
    """The examples of docs/tensorflow.md run in order, as a reader would type them."""
    examples = [text for language, text in blocks("docs/tensorflow.md") if language == "python"]
    assert len(examples) == 2
    assert len(run("".join(examples), local_server).splitlines()) == 2


def test_every_make_target_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z]+(?:-[a-z]+)*)", README)) <= targets


def test_every_golden_family_is_in_the_docs() -> None:
    """docs/frameworks.md has one line for each golden family, and the test files it names load that family."""
    index = json.loads((ROOT / "tests/golden/data/index.json").read_text())
    lines = re.findall(r"^\| `(\w+)` \| .* \| (`test_\w+\.py`.*?) \|", (ROOT / "docs/frameworks.md").read_text(), re.M)
    assert sorted(family for family, _ in lines) == sorted({case["family"] for case in index})
    for family, where in lines:
        for name in re.findall(r"`(\w+\.py)`", where):
            assert f'"{family}"' in (ROOT / "tests/golden" / name).read_text(), (family, name)


def test_every_adr_is_short() -> None:
    """An ADR has at most 60 lines."""
    for path in (ROOT / "docs/adr").glob("*.md"):
        assert len(path.read_text().splitlines()) <= 60, path.name

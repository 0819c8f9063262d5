"""The city finder as its user runs it: trained, asked, interrupted."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import shardloss
from matplotlib import image
from shardloss_server.rpc.serve import Server
from test_serve import children_of, wait_gone

from examples.cities.__main__ import main

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 500.0  # far above what a busy machine needs
START_S = 300.0
STOP_S = 200.0
LEFT_BEHIND = ("shardloss-*", "cities-*", "ray*")  # temporary directories of the server, of the demo, of Ray


@dataclass(frozen=True, slots=True)
class Demo:
    """A running demo, and the directory that it and all it starts take for temporary files."""

    process: subprocess.Popen[str]
    temp: Path

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """Exit status and output, once it has ended."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def leftovers(self) -> list[Path]:
        """Directories that should have been removed."""
        return [path for pattern in LEFT_BEHIND for path in self.temp.glob(pattern)]


@contextmanager
def demo(*arguments: str) -> Iterator[Demo]:
    """The demo in a session of its own, so that a signal reaches it alone; nothing of it lives on after the block."""
    # Not below tmp_path: the path of a Unix socket has at most 107 bytes.
    with TemporaryDirectory(prefix="t-") as temp:
        environment = {**os.environ, "TMPDIR": temp, "COLUMNS": "200", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"}
        with attentive_to_interrupts():
            process = subprocess.Popen(
                [sys.executable, "-m", "examples.cities", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                start_new_session=True,
            )
        with process:
            try:
                yield Demo(process, Path(temp))
            finally:
                end(process)


@contextmanager
def attentive_to_interrupts() -> Iterator[None]:
    """What is started here sees SIGINT even if the tests were started in the background, which ignore it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def end(process: subprocess.Popen[str]) -> None:
    """In order if it can, by force if it must: also what it has started."""
    if process.poll() is None:
        started = children_of(process.pid)
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for pid in wait_gone(started, 5.0):
            os.kill(pid, signal.SIGKILL)


def run(*arguments: str) -> tuple[int, str]:
    """Exit status and output of a demo that ends by itself."""
    with demo(*arguments) as running:
        return running.finish(RUN_S)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Exit status and output of a demo in this process."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        status = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@dataclass(frozen=True, slots=True)
class Finished:
    """A small run that came to its end."""

    status: int
    output: str
    out: Path
    leftovers: list[Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, local_server: Server) -> Finished:
    """A small run against a server of the tests."""
    out = tmp_path_factory.mktemp("cities") / "out"
    with demo("train", "--small", "--address", local_server.address, "--out", str(out)) as running:
        status, output = running.finish(RUN_S)
        return Finished(status, output, out, running.leftovers())


@pytest.fixture(scope="module")
def finished_alone(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A small run with a service of its own."""
    out = tmp_path_factory.mktemp("cities") / "out"
    with demo("train", "--small", "--out", str(out)) as running:
        status, output = running.finish(RUN_S)
        return Finished(status, output, out, running.leftovers())


@pytest.mark.slow
@pytest.mark.ray
def test_a_run_with_a_service_of_its_own_leaves_nothing(finished_alone: Finished) -> None:
    """It starts Ray, trains to the same figures, and stops what it started."""
    assert finished_alone.status == 0, finished_alone.output
    assert finished_alone.leftovers == []
    assert_learned(finished_alone)


def test_a_small_run_shows_figures_and_answers(finished: Finished) -> None:
    """It names the source of the data, how it trained, and the places of misspelt names."""
    assert finished.status == 0, finished.output
    for shown in ("GeoNames", "2,000 cities", "rows/s", "before", "after", "baseline", "MRR", "sampled - exact"):
        assert shown in finished.output
    for asked, place in {
        "Koeln": "Köln, Germany",
        "Sanktpeterburg": "Saint Petersburg, Russia",
        "Nu York": "New York City, United States",
    }.items():
        (row,) = [line for line in finished.output.splitlines() if line.startswith(f"│ {asked} ")]
        assert place in row
    assert finished.leftovers == []


def test_a_small_run_learns(finished: Finished) -> None:
    """Before training every city is as probable; after it held-out names are found, which no baseline can."""
    assert_learned(finished)


def assert_learned(finished: Finished) -> None:
    """result.json has the figures before and after training and of the baseline, and the run improved on both."""
    result = json.loads((finished.out / "result.json").read_text())
    rows = ("before", "after", "baseline")
    assert set(result) == {*rows, "rows_per_s", "train_s", "seed", "eval_names"}
    for row in rows:
        assert set(result[row]) == {"nll", "hit_at_1", "hit_at_10", "mrr", "gap"}
        assert 0 <= result[row]["hit_at_1"] <= result[row]["hit_at_10"] <= 1
        assert result[row]["hit_at_1"] <= result[row]["mrr"] <= 1
    before, after, baseline = (result[row] for row in rows)
    assert before["nll"] == pytest.approx(math.log(2000), abs=1e-4)
    for other in (before, baseline):
        assert after["nll"] < other["nll"] - 2
        assert after["hit_at_1"] > other["hit_at_1"] + 0.2
        assert after["hit_at_10"] > other["hit_at_10"] + 0.4
        assert after["mrr"] > other["mrr"] + 0.2
    assert before["gap"] == pytest.approx(math.log(129 / 2000), abs=1e-2)  # all alike: one of 1 + 128, not of 2,000
    assert before["gap"] < after["gap"] < 0
    assert baseline["gap"] is None
    assert (result["seed"], result["eval_names"]) == (0, 500)
    assert result["rows_per_s"] > 0
    assert result["train_s"] > 0


def test_a_small_run_draws_its_curve(finished: Finished) -> None:
    """curve.png is a picture with something on it."""
    assert (finished.out / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(finished.out / "curve.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0


def test_the_trained_model_answers_without_a_service(finished: Finished) -> None:
    """ask gives five places, the right one first."""
    status, output = run("ask", "Kolonia, Koeln", "--out", str(finished.out))
    assert status == 0, output
    places = [line for line in output.splitlines() if "%" in line]
    assert len(places) == 5
    assert "Kolonia, Koeln" in places[0]
    assert "Köln, Germany" in places[0]


def test_asking_before_training_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 1, the missing file and the command that makes it."""
    status, output = run_here(capsys, "ask", "Koeln", "--out", str(tmp_path / "nothing"))
    assert status == 1
    assert "model.npz" in output
    assert "make demo" in output
    assert "Traceback" not in output


def test_an_empty_name_says_how_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """Exit status 2 and an example."""
    status, output = run_here(capsys, "ask", "")
    assert status == 2
    assert "make demo-ask NAME=" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_run_leaves_nothing_behind(finished_alone: Finished) -> None:
    """Ctrl-C while it trains: status 130, no process, no temporary directory; an earlier run's files stay."""
    kept = {name: (finished_alone.out / name).read_bytes() for name in ("result.json", "curve.png", "model.npz")}
    with demo("train", "--small", "--steps", "1000000", "--out", str(finished_alone.out)) as running:
        wait_until_training(running)
        interrupt(running)
    assert {name: (finished_alone.out / name).read_bytes() for name in kept} == kept


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_interrupted_while_ray_starts_leaves_nothing_behind(finished_alone: Finished) -> None:
    """Ctrl-C at the moment when Ray has started its own processes and no worker yet: as above."""
    with demo("train", "--small", "--out", str(finished_alone.out)) as running:
        wait_until(running, lambda: any("agent.py" in program_of(pid) for pid in children_of(running.process.pid)))
        interrupt(running)


def interrupt(running: Demo) -> None:
    """Ctrl-C, and all that it promises."""
    started = children_of(running.process.pid)
    sessions = {os.getsid(pid) for pid in started}
    assert len(started) > 3
    running.process.send_signal(signal.SIGINT)
    status, output = running.finish(STOP_S)
    assert status == 130, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert wait_gone(started | processes_in(sessions), 60.0) == set()
    assert running.leftovers() == []


def wait_until_training(running: Demo) -> None:
    """Poll the demo's own service until it has taken some steps."""
    wait_until(running, lambda: any(running.temp.glob("cities-*/ready")))
    (ready,) = running.temp.glob("cities-*/ready")
    with shardloss.connect(ready.read_text()) as client:
        wait_until(running, lambda: any(table.num_commits > 3 for table in client.list_tables()))


def wait_until(running: Demo, condition: Callable[[], bool]) -> None:
    """Poll while the demo runs."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert running.process.poll() is None, running.process.communicate()[0]
        assert time.monotonic() < deadline, "the demo did not come so far"
        time.sleep(0.02)


def program_of(pid: int) -> str:
    """What a process was started as, without its options."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0--")[0]
    except OSError:
        return ""


def processes_in(sessions: set[int]) -> set[int]:
    """Ids of the processes of these sessions, whoever their parent has become."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) in sessions:
                    found.add(int(entry.name))
            except ProcessLookupError:
                continue
    return found

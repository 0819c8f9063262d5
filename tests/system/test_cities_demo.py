"""The city finder, run as a user would run it: train, ask and interrupt."""

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

from examples.cities.__main__ import main
from tests.servers import children_of, wait_gone

pytestmark = pytest.mark.timeout(900)

ROOT = Path(__file__).resolve().parents[2]
RUN_S = 500.0  # far more than a busy machine needs
START_S = 300.0
STOP_S = 200.0
LEFT_BEHIND = ("shardloss-*", "cities-*", "ray*")  # temporary directories of the server, of the demo, of Ray


@dataclass(frozen=True, slots=True)
class Demo:
    """A running demo, and the directory for the temporary files of all its processes."""

    process: subprocess.Popen[str]
    temp: Path

    def finish(self, timeout_s: float) -> tuple[int, str]:
        """Wait for the end and return the exit status and the output."""
        output, _ = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, output

    def leftovers(self) -> list[Path]:
        """Return the temporary directories that should have been removed."""
        return [path for pattern in LEFT_BEHIND for path in self.temp.glob(pattern)]


@contextmanager
def demo(*arguments: str) -> Iterator[Demo]:
    """Run the demo in its own session, so that signals reach it alone; end all its processes after the block."""
    # Not under tmp_path: the path of a Unix socket has at most 107 bytes.
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
    """Let child processes receive SIGINT even if the tests run in the background, where it is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def end(process: subprocess.Popen[str]) -> None:
    """Terminate the process, and kill it if it does not end in time; kill its remaining descendants."""
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
    """Run a demo that ends by itself and return its exit status and output."""
    with demo(*arguments) as running:
        return running.finish(RUN_S)


def run_here(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    """Run the demo in this process and return its exit status and output."""
    previous = signal.getsignal(signal.SIGTERM)
    try:
        status = main(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)
    captured = capsys.readouterr()
    return status, captured.out + captured.err


@dataclass(frozen=True, slots=True)
class Finished:
    """A small run that has ended."""

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
    """A run without --address starts Ray, reaches the same figures, and stops every process it started."""
    assert finished_alone.status == 0, finished_alone.output
    assert finished_alone.leftovers == []
    assert_learned(finished_alone)


def test_a_small_run_shows_figures_and_answers(finished: Finished) -> None:
    """The output names the source of the data, the training figures and the places of misspelt names."""
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
    """Before training all cities are equally probable; afterwards the run beats the baseline on held-out names."""
    assert_learned(finished)


def assert_learned(finished: Finished) -> None:
    """Assert that result.json has all figures, and that training improved on the untrained model and the baseline."""
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
    assert before["gap"] == pytest.approx(math.log(129 / 2000), abs=1e-2)  # all equal: one of 1 + 128, not of 2,000
    assert before["gap"] < after["gap"] < 0
    assert baseline["gap"] is None
    assert (result["seed"], result["eval_names"]) == (0, 500)
    assert result["rows_per_s"] > 0
    assert result["train_s"] > 0


def test_a_small_run_draws_its_curve(finished: Finished) -> None:
    """curve.png is a valid PNG image that is not blank."""
    assert (finished.out / "curve.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(finished.out / "curve.png")
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0


def test_the_trained_model_answers_without_a_service(finished: Finished) -> None:
    """`ask` prints five places, the correct one first."""
    status, output = run("ask", "Kolonia, Koeln", "--out", str(finished.out))
    assert status == 0, output
    places = [line for line in output.splitlines() if "%" in line]
    assert len(places) == 5
    assert "Kolonia, Koeln" in places[0]
    assert "Köln, Germany" in places[0]


def test_asking_before_training_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 1 and names the missing file and the command that creates it."""
    status, output = run_here(capsys, "ask", "Koeln", "--out", str(tmp_path / "nothing"))
    assert status == 1
    assert "model.npz" in output
    assert "make demo" in output
    assert "Traceback" not in output


def test_an_empty_name_says_how_to_ask(capsys: pytest.CaptureFixture[str]) -> None:
    """The command exits with 2 and shows an example."""
    status, output = run_here(capsys, "ask", "")
    assert status == 2
    assert "make demo-ask NAME=" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.ray
def test_an_interrupted_run_leaves_nothing_behind(finished_alone: Finished) -> None:
    """Ctrl-C during training exits with 130 and leaves nothing behind; an earlier run's files are unchanged."""
    kept = {name: (finished_alone.out / name).read_bytes() for name in ("result.json", "curve.png", "model.npz")}
    with demo("train", "--small", "--steps", "1000000", "--out", str(finished_alone.out)) as running:
        wait_until_training(running)
        interrupt(running)
    assert {name: (finished_alone.out / name).read_bytes() for name in kept} == kept


@pytest.mark.ray
@pytest.mark.slow
def test_a_run_interrupted_while_ray_starts_leaves_nothing_behind(finished_alone: Finished) -> None:
    """Ctrl-C after Ray has started its own processes, but no worker yet, also leaves nothing behind."""
    with demo("train", "--small", "--out", str(finished_alone.out)) as running:
        wait_until(running, lambda: any("agent.py" in program_of(pid) for pid in children_of(running.process.pid)))
        interrupt(running)


def interrupt(running: Demo) -> None:
    """Send SIGINT and assert that the demo exits with 130 and leaves nothing behind."""
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
    """Poll the demo's own service until some steps have been applied."""
    wait_until(running, lambda: any(running.temp.glob("cities-*/ready")))
    (ready,) = running.temp.glob("cities-*/ready")
    with shardloss.connect(ready.read_text()) as client:
        wait_until(running, lambda: any(table.num_commits > 3 for table in client.list_tables()))


def wait_until(running: Demo, condition: Callable[[], bool]) -> None:
    """Poll until the condition is true, while the demo runs."""
    deadline = time.monotonic() + START_S
    while not condition():
        assert running.process.poll() is None, running.process.communicate()[0]
        assert time.monotonic() < deadline, "the demo did not reach the awaited state in time"
        time.sleep(0.02)


def program_of(pid: int) -> str:
    """Return the command line of a process without its options."""
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0--")[0]
    except OSError:
        return ""


def processes_in(sessions: set[int]) -> set[int]:
    """Return the ids of all processes in these sessions, including those whose parent has ended."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) in sessions:
                    found.add(int(entry.name))
            except ProcessLookupError:
                continue
    return found

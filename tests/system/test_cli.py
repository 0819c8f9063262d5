"""The client's command line against a server: its output, its exit codes and the findings of the doctor."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import shardloss
import typer
from shardloss.cli import app, checks, doctor, status
from shardloss.status import MethodStatus, WorkerStatus
from shardloss_server.rpc import admin
from shardloss_server.rpc.serve import Server

ROOT = Path(__file__).resolve().parents[2]
DOCS = (ROOT / "docs/cli.md").read_text()
V, D = 40, 8


@pytest.fixture
def run(local_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs a command against the server and returns its exit code, stdout and stderr."""
    monkeypatch.setenv("SHARDLOSS_ADDRESS", local_server.address)
    monkeypatch.setenv("SHARDLOSS_ADMIN_ADDRESS", local_server.admin_address)
    monkeypatch.delenv("SHARDLOSS_OUTPUT", raising=False)

    def run(*args: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = app.run(args)
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture
def run_json(run: Any) -> Callable[..., Any]:
    """Return a function that runs a command, checks its exit code (0 by default) and returns its JSON document."""

    def run_json(*args: str, code: int = 0) -> Any:
        found, out, err = run(*args, "--output", "json")
        assert found == code, (out, err)
        assert err == ""
        assert len(out.splitlines()) == 1
        return json.loads(out)

    return run_json


@pytest.fixture
def data(tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds the files named in the documentation's examples; it is the working directory of the test."""
    monkeypatch.chdir(tmp_path)
    np.save("hidden.npy", rng.normal(size=(30, D)).astype(np.float32))
    np.save("labels.npy", rng.integers(0, V, 30))
    safetensors.numpy.save_file({"lm_head.weight": rng.normal(size=(V, D)).astype(np.float32)}, "model.safetensors")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/1-of-1.safetensors").hardlink_to("model.safetensors")
    index = {"weight_map": {"lm_head.weight": "1-of-1.safetensors"}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


@pytest.fixture
def only_its_own(client: shardloss.LossClient) -> Iterator[None]:
    """Delete the tables that a test created under fixed names."""
    before = {info.name for info in client.list_tables()}
    yield
    for info in client.list_tables():
        if info.name not in before:
            client.delete_table(info.name)


def commands() -> Iterator[tuple[str, Any]]:
    """Yield the words of every command, and the command."""
    root: Any = typer.main.get_command(app.app)
    for name, one in root.commands.items():
        yield from ((f"{name} {sub}", its) for sub, its in getattr(one, "commands", {"": one}).items())


def examples() -> list[str]:
    return [line for block in re.findall(r"```sh\n(.*?)```", DOCS, re.S) for line in block.splitlines()]


def test_the_examples_of_the_docs_run_as_they_stand(run: Any, data: Path, only_its_own: None) -> None:
    """The examples run in order and exit with 0; only the doctor may fail, because of the machine under test."""
    for line in examples():
        code, out, err = run(*line.split()[1:])
        assert code == 0 or "doctor" in line, (line, out, err)
        assert out, line


def test_every_command_and_shared_option_is_in_the_docs() -> None:
    """Each command has an example, and each option and variable that the docs name belongs to a command."""
    lines = examples()
    options = {"--help"}
    for words, one in commands():
        assert any(
            line.startswith(f"shardloss {words.strip()} ") or line == f"shardloss {words.strip()}" for line in lines
        ) or (words.strip() == "version"), words
        options |= {name for parameter in one.params for name in (*parameter.opts, *parameter.secondary_opts)}
    files_docs = (ROOT / "docs/files.md").read_text()
    server_options = {"--port", "--admin-port"}
    named = set(re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", DOCS + files_docs))
    assert named - server_options <= options
    variables = set(re.findall(r"SHARDLOSS_[A-Z_]+", DOCS))
    known = {
        parameter.envvar for _, one in commands() for parameter in one.params if getattr(parameter, "envvar", None)
    }
    assert variables == known


def test_the_example_of_the_files_page_runs(local_server: Server, data: Path, only_its_own: None) -> None:
    example = "".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/files.md").read_text(), re.S))
    exec(compile(example.replace("127.0.0.1:7070", local_server.address), "files.md", "exec"), {})


# Tables


def test_a_table_goes_through_its_life(run_json: Any, data: Path, fresh_name: Callable[[], str]) -> None:
    """Create, show, list, export, import into another number of shards and delete each print one JSON document."""
    name = fresh_name()
    made = run_json(
        "table", "create", name, "--classes", str(V), "--dim", str(D), "--optimizer", "adam:beta1=0.8",
        "--count-labels",
        "--initializer", "normal:stddev=0.1,seed=3", "--shards", "3", "--placement", "div", "--no-bias",
    )  # fmt: skip
    assert made["optimizer"] == {"kind": "adam", "beta1": 0.8, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    assert made["initializer"] == {"kind": "normal", "stddev": 0.1, "seed": 3}
    assert (made["num_shards"], made["placement"], made["bias"], made["count_labels"]) == (3, "div", False, True)
    assert run_json("table", "show", name) == made
    assert made in run_json("table", "list")["tables"]
    exported = run_json("table", "export", name, "t", "--format", "numpy")
    assert (exported["format"], exported["num_rows"], exported["version"]) == ("numpy", V, 0)
    imported = run_json("table", "import", "t", f"{name}-b", "--shards", "2")
    assert imported["num_shards"] == 2
    assert imported["placement"] == "div"
    assert run_json("table", "delete", f"{name}-b", "--yes") == {"deleted": f"{name}-b"}
    assert run_json("table", "show", f"{name}-b", code=1)["error"]["reason"] == "TABLE_NOT_FOUND"


def test_errors_say_what_was_found_and_what_to_do(run: Any, run_json: Any, data: Path) -> None:
    """Errors go to stderr as text or to stdout as JSON; the exit code is 1 for a refused call, 2 for a usage error."""
    code, out, err = run("table", "import", "nothing.safetensors", "x")
    assert (code, out) == (1, "")
    assert err == "BAD_FILE: nothing.safetensors does not exist\n"
    assert run("table", "import", "nothing.safetensors", "x", "--address", free_address())[2] == err
    refused = run_json("table", "create", "Bad Name", "--classes", "2", "--dim", "2", code=1)["error"]
    assert (refused["reason"], refused["field"]) == ("INVALID_ARGUMENT", "spec.name")
    refused = run_json("table", "create", "x", "--classes", "2", "--dim", "2", "--dtype", "float16", code=1)["error"]
    assert refused["message"] == "dtype = 'float16' must be one of 'float32', 'float64', 'bfloat16'"
    assert run_json("version") == {"version": shardloss.__version__}
    for args, complaint in (
        (("table", "create", "x", "--classes", "0", "--dim", "2"), "--classes"),
        (("table", "create", "x", "--classes", "2", "--dim", "2", "--optimizer", "os"), "one of|none of sgd"),
        (("table", "create", "x", "--classes", "2", "--dim", "2", "--optimizer", "adam:beta=1"), "it has beta1"),
        (("table", "create", "x", "--classes", "2", "--dim", "2", "--optimizer", "adam:eps=small"), "of type float"),
        (("table", "create", "x", "--classes", "2", "--dim", "2", "--initializer", "normal"), "needs stddev"),
        (("tabel", "list"), "tabel"),
        (("table", "show"), "name"),
        (("table", "list", "--port", "7"), "--port"),
    ):
        error = run_json(*args, code=2)["error"]
        assert error["reason"] == "USAGE"
        assert re.search(complaint, error["message"])
        code, out, err = run(*args)
        assert (code, out) == (2, "")
        assert re.search(complaint, err)


def test_a_server_that_is_away_is_a_named_error(run_json: Any) -> None:
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))  # bound but not listening: connections fail, and no other process gets the port
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
        error = run_json("table", "list", "--address", address, "--timeout-s", "0.3", code=1)["error"]
    assert error["reason"] in ("SERVER_UNAVAILABLE", "DEADLINE_EXCEEDED")


def test_an_interrupted_import_says_what_it_left(
    run_json: Any,
    data: Path,
    client: shardloss.LossClient,
    fresh_name: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted import exits with 130 and says how to continue; with --resume it completes."""
    name = fresh_name()
    args = ("table", "import", "model.safetensors", name, "--weights-name", "lm_head.weight")

    def interrupt(*_args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shardloss.Table, "write_state", interrupt)
        error = run_json(*args, code=130)["error"]
    assert error["reason"] == "INTERRUPTED"
    assert f"shardloss table delete {name}.part" in error["message"]
    assert run_json(*args, code=1)["error"]["reason"] == "TABLE_EXISTS"
    assert run_json(*args, "--resume")["name"] == name


def test_deleting_asks_first(
    run: Any, run_json: Any, client: shardloss.LossClient, fresh_name: Callable[[], str], monkeypatch
) -> None:
    """Without a terminal to ask on, `table delete` is a usage error unless --yes is given."""
    name = client.create_table(fresh_name(), num_classes=2, dim=2).name
    assert run("table", "delete", name)[0] == 2
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("typer.confirm", lambda text, err: (_ for _ in ()).throw(typer.Abort()))
    assert run("table", "delete", name) == (130, "", "INTERRUPTED: interrupted\n")
    monkeypatch.setattr("typer.confirm", lambda text, err: not err)
    error = run_json("table", "delete", name, code=1)["error"]
    assert error == {"reason": "INTERRUPTED", "message": f"{name} was not deleted: the answer was no"}
    assert client.table(name).name == name
    monkeypatch.setattr("typer.confirm", lambda text, err: err)
    assert run("table", "delete", name)[0] == 0


def test_progress_shows_on_a_terminal_alone(run: Any, data: Path, monkeypatch, fresh_name: Callable[[], str]) -> None:
    """Progress is printed on stderr if it is a terminal; stdout contains only the result."""
    name = fresh_name()
    args = ("table", "import", "model.safetensors", name, "--weights-name", "lm_head.weight", "--output", "json")
    code, out, err = run(*args)
    assert (code, err) == (0, "")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    code, out, err = run("table", "export", name, "t", "--output", "json")
    assert code == 0
    assert json.loads(out)["num_rows"] == V
    assert "export" in err


# Evaluation


def test_evaluate_reports_what_the_library_does(
    run_json: Any, data: Path, client: shardloss.LossClient, fresh_name: Callable[[], str]
) -> None:
    """Figures from .npy and safetensors files equal the library's, also if the batch size does not divide the rows."""
    table = client.create_table(fresh_name(), num_classes=V, dim=D)
    hidden, labels = np.load("hidden.npy"), np.load("labels.npy")
    labels[4] = -100
    np.save("labels.npy", labels)
    exact = table.evaluate(hidden, labels, logits=shardloss.LogitTransform(scale=2.0))
    options = ("--k", "3", "--scale", "2", "--batch", "7")
    found = run_json("evaluate", table.name, "--hidden", "hidden.npy", "--labels", "labels.npy", *options)
    assert found["counted"] == 29
    assert found["nll"] == pytest.approx(exact.mean_loss, rel=1e-12)
    assert (found["hit@3"], found["mrr"]) == (pytest.approx(exact.hit_rate(3)), pytest.approx(exact.mrr()))
    safetensors.numpy.save_file({"x": hidden, "labels": labels}, "set.safetensors")
    files = ("--hidden", "set.safetensors", "--labels", "set.safetensors", "--hidden-name", "x")
    assert run_json("evaluate", table.name, *files, *options) == found
    np.save("short.npy", labels[:-1])
    error = run_json("evaluate", table.name, "--hidden", "hidden.npy", "--labels", "short.npy", code=1)["error"]
    assert "29 labels for 30 rows" in error["message"]
    labels[29] = V
    np.save("wrong.npy", labels)
    error = run_json("evaluate", table.name, "--hidden", "hidden.npy", "--labels", "wrong.npy", *options, code=1)
    assert error["error"]["index"] == "29"
    assert f"labels[29] = {V} is outside" in error["error"]["message"]
    error = run_json("evaluate", table.name, "--hidden", "labels.npy", "--labels", "labels.npy", code=1)["error"]
    assert "rank 2" in error["message"]


# Status


def test_status_tells_what_the_server_does(run: Any, run_json: Any, client: shardloss.LossClient, fresh_name) -> None:
    """The status reports workers, tables, calls with their errors, and memory."""
    table = client.create_table(fresh_name(), num_classes=7, dim=3, num_shards=2, optimizer=shardloss.Adam())
    hidden, labels = np.zeros((2, 3), np.float32), np.array([1, 2])
    table.session().train_step(hidden, labels, shardloss.FullSoftmax(), learning_rate=0.1)
    with pytest.raises(shardloss.errors.TableNotFound):
        client.table("nowhere")
    seen = run_json("status")
    assert seen["num_workers"] == 2
    assert [worker["up"] for worker in seen["workers"]] == [True, True]
    assert all(worker["pid"] == os.getpid() and worker["resident_bytes"] > 1e7 for worker in seen["workers"])
    (one,) = (each for each in seen["tables"] if each["name"] == table.name)
    assert (one["version"], one["num_commits"], one["num_sessions"], one["rows_lost"]) == (1, 1, 1, False)
    assert one["num_bytes"] == 7 * 4 * (3 + 1) * 3  # rows and biases, each with two moments
    methods = {method["name"]: method for method in seen["methods"]}
    assert methods["GetTable"]["errors"]["TABLE_NOT_FOUND"] >= 1
    assert methods["ComputeLoss"]["num_calls"] >= 1
    assert 0 < methods["ComputeLoss"]["median_s"] <= methods["ComputeLoss"]["p99_s"]
    assert methods["ComputeLoss"]["rate"] > 0
    assert {each["name"]: each["num_calls"] for each in seen["places"]} == {"calls": 0, "commits": 0, "streams": 0}
    assert abs(seen["time_s"] - time.time()) < 60
    assert seen["versions"]["shardloss-server"] == shardloss.__version__
    code, out, _ = run("status")
    assert code == 0
    assert table.name in out
    assert re.search(r"ComputeLoss .* \d+\.\d ms", out)
    assert "2 of 2 workers" in out


def test_what_was_not_measured_is_shown_as_a_dash(capsys: pytest.CaptureFixture[str]) -> None:
    """A method without calls in the last minute has no latency, and a worker that is down no memory."""
    seen: Any = SimpleNamespace(
        methods=[
            MethodStatus("GetTable", 9, {}, 2.0, 0.0, 0.0, 0.0),
            MethodStatus("Commit", 7, {}, 0.0, 0.0, 0.0, 0.0),
        ],
        workers=[WorkerStatus(3, False, "cpu", "", 0, 2, 0, 0, 0, 0, 0, 0, 0, 0)],
    )
    status.screen().print(status.methods(seen))
    called, idle = (line.split() for line in capsys.readouterr().out.splitlines() if "/s" in line)
    assert called[-2:] == ["0.0", "ms"]
    assert idle == ["Commit", "7", "0.0/s", "-", "-", "-"]
    status.screen().print(status.workers(seen))
    assert capsys.readouterr().out.splitlines()[1].split() == ["3", "DOWN", "cpu", "-", "-", "2", *"------"]


@pytest.mark.parametrize("output", ["json", "text"])
def test_status_goes_on_until_it_is_interrupted(run: Any, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """`status --watch` prints one JSON object per line and exits with 0 on Ctrl-C."""
    waits = iter([None, None])

    def wait(seconds: float) -> None:
        assert seconds == 0.5
        if next(waits, KeyboardInterrupt) is KeyboardInterrupt:
            raise KeyboardInterrupt

    monkeypatch.setattr("shardloss.cli.status.time", SimpleNamespace(sleep=wait))
    code, out, _ = run("status", "--watch", "--interval-s", "0.5", "--output", output)
    assert code == 0
    if output == "json":
        uptimes = [json.loads(line)["uptime_s"] for line in out.splitlines()]
        assert len(uptimes) == 3
        assert uptimes == sorted(uptimes)
    else:
        assert "2 of 2 workers" in out


def test_the_data_port_does_not_tell_the_status(client: shardloss.LossClient) -> None:
    """The status is served on the admin port only."""
    with pytest.raises(shardloss.errors.NotSupported):
        client.status()


# Doctor


@pytest.fixture
def sound(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Give the doctor enough disk space and OMP_NUM_THREADS=1, whatever the machine has."""
    rich = checks.Disk("", "", 1 << 40, 1 << 40)
    monkeypatch.setattr(doctor, "disk_at", lambda what, path: replace(rich, what=what, path=path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def free_address() -> str:
    """Return an address on which no process listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def findings(document: Any) -> dict[str, Any]:
    return {finding["check"]: finding for finding in document["findings"]}


def wrong(document: Any) -> list[str]:
    assert document["ok"] is False
    return [finding["check"] for finding in document["findings"] if finding["verdict"] == "wrong"]


def test_the_doctor_finds_nothing_wrong_with_a_sound_server(run: Any, run_json: Any, sound: None) -> None:
    document = run_json("doctor")
    assert document["ok"] is True
    verdicts = {name: each["verdict"] for name, each in findings(document).items()}
    assert verdicts.pop("token") == "skipped"
    assert set(verdicts.values()) == {"ok"}
    assert len(document["findings"]) == len(checks.CHECKS) == 9
    assert "2 of 2 workers are up" in run("doctor")[1]


@pytest.fixture
def taken() -> Iterator[str]:
    """An address on which a process other than a shardloss server listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def test_the_doctor_names_a_taken_port(
    run_json: Any, sound: None, taken: str, monkeypatch, local_server: Server
) -> None:
    """A port is taken if another process listens there, or if a running server already uses it."""
    monkeypatch.setattr(doctor, "ANSWER_S", 0.3)
    for address in (taken, local_server.address):
        document = run_json("doctor", "--listen", address, code=1)
        assert wrong(document) == ["port"]
        assert address in findings(document)["port"]["found"]
    assert findings(run_json("doctor", "--listen", free_address()))["port"]["verdict"] == "ok"


def test_the_doctor_names_a_token_that_others_can_read(run_json: Any, sound: None, tmp_path: Path) -> None:
    """A token file that others can read, or that is missing, is a finding even before a server runs."""
    token, address = tmp_path / "reader.token", free_address()
    token.write_text("secret")
    args = ("doctor", "--address", address, "--admin-address", address, "--token-file", str(token))
    token.chmod(0o640)
    document = run_json(*args, code=1)
    assert wrong(document) == ["token"]
    assert "mode 0640: others can read it" in findings(document)["token"]["found"]
    assert f"chmod 600 {token}" in findings(document)["token"]["do"]
    token.chmod(0o600)
    assert findings(run_json(*args))["token"]["verdict"] == "ok"
    token.unlink()
    assert wrong(run_json(*args, code=1)) == ["token"]
    document = run_json("doctor", "--token-file", str(token), code=1)  # a running server cannot be queried without it
    assert wrong(document) == ["token"]
    assert "is in use" in findings(document)["port"]["found"]


def test_the_doctor_names_what_is_wrong_with_a_connection(
    run_json: Any, sound: None, taken: str, monkeypatch: pytest.MonkeyPatch, local_server: Server
) -> None:
    """Malformed addresses, other programs, swapped ports, TLS on one side and proxies; a server to come is none."""
    data, admin = local_server.address, local_server.admin_address
    short, long = 0.5, 60.0  # seconds for the answers
    for args, words, limit_s in (
        (("--address", f"http://{data}"), f"data port http://{data}: INVALID_ARGUMENT: .*write '{data}'", long),
        (("--admin-address", "localhost"), "admin port localhost: INVALID_ARGUMENT: .*has no port", long),
        (("--address", taken), f"data port {taken}: SERVER_UNAVAILABLE: .*says nothing", short),
        (("--address", admin), f"data port {admin}: NOT_SUPPORTED: this is the server's admin port", long),
        (("--admin-address", data), f"admin port {data}: NOT_SUPPORTED: this is the server's data port", long),
        (("--tls",), f"data port {data}: SERVER_UNAVAILABLE: no connection", short),
        (("--ca-file", "/none"), "INVALID_ARGUMENT: cannot read ca_file /none", long),
        (("--address", "nobody.invalid:1"), "data port nobody.invalid:1: SERVER_UNAVAILABLE", short),
    ):
        monkeypatch.setattr(doctor, "ANSWER_S", limit_s)
        document = run_json("doctor", *args, code=1)
        assert wrong(document) == ["connection"], args
        assert re.search(words, findings(document)["connection"]["found"]), args
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setattr(doctor, "ANSWER_S", long)
    assert findings(run_json("doctor"))["connection"]["verdict"] == "ok"
    monkeypatch.setattr(doctor, "ANSWER_S", short)
    document = run_json("doctor", "--address", "192.0.2.1:7070", code=1)
    assert "through the proxy http://127.0.0.1:1 (http_proxy" in findings(document)["connection"]["found"]
    nowhere = ("--address", free_address(), "--admin-address", "unix:/nowhere/at/all")
    assert findings(run_json("doctor", *nowhere))["connection"]["verdict"] == "skipped"


def test_the_doctor_names_a_small_shared_memory_and_a_full_disk(
    run_json: Any, monkeypatch: pytest.MonkeyPatch, local_server: Server
) -> None:
    """Too little /dev/shm or disk space is a finding; /proc stands in for a file system without free space."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(admin, "SHARED_MEMORY", "/nowhere")
    monkeypatch.setattr(doctor, "SHARED_MEMORY", "/proc")
    document = run_json("doctor", "--data-dir", "/proc", code=1)
    assert {"shared memory", "disk"} <= set(wrong(document))
    assert "data_dir /proc: 0 B free" in findings(document)["disk"]["found"]
    assert "needs 512.0 MiB" in findings(document)["shared memory"]["found"]
    assert "--shm-size" in findings(document)["shared memory"]["do"]


def test_the_doctor_finds_nothing_wrong_before_a_first_server(run_json: Any, sound: None, monkeypatch) -> None:
    """Neither a missing OMP_NUM_THREADS nor a missing Ray folder is a finding before the README's first start."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere/at/all")
    document = run_json("doctor", "--address", free_address(), "--admin-address", free_address())
    assert findings(document)["disk"]["found"].startswith("Ray's folder /: ")


@pytest.mark.parametrize("option", [("--listen", "7070"), ("--listen", "host:http"), ("--data-dir", "/nowhere")])
def test_the_doctor_does_not_pass_over_what_it_cannot_look_at(run_json: Any, option: tuple[str, str]) -> None:
    assert option[1] in run_json("doctor", *option, code=2)["error"]["message"]


def test_the_doctor_names_too_many_threads(run_json: Any, sound: None, monkeypatch, local_server: Server) -> None:
    """More threads than cores are a finding: those of the server's workers or, without a server, OMP_NUM_THREADS."""
    group = local_server.catalog.group
    seen = group.stats(1.0)
    greedy = [replace(one, stats=one.stats and replace(one.stats, num_threads=64)) for one in seen]
    with monkeypatch.context() as patch:
        patch.setattr(group, "stats", lambda timeout_s: greedy)
        document = run_json("doctor", code=1)
    assert wrong(document) == ["threads"]
    assert "2 workers compute with 128 threads" in findings(document)["threads"]["found"]
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: range(8))
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    nowhere = ("--address", free_address(), "--admin-address", free_address())
    document = run_json("doctor", *nowhere, code=1)
    assert wrong(document) == ["threads"]
    assert "OMP_NUM_THREADS=9 on 8 cores" in findings(document)["threads"]["found"]
    assert findings(document)["workers"]["verdict"] == "skipped"


@pytest.mark.parametrize(
    ("reported", "do"),
    [
        ({"shardloss-server": "0.2.0", "protobuf": "6.33.6"}, "install the same release"),
        ({"shardloss-server": shardloss.__version__, "protobuf": "5.29.1"}, "update protobuf (server)"),
    ],
)
def test_the_doctor_names_other_versions(run_json: Any, sound: None, monkeypatch, reported: Any, do: str) -> None:
    monkeypatch.setattr(admin, "versions", lambda: reported)
    document = run_json("doctor", code=1)
    assert wrong(document) == ["versions"]
    assert do in findings(document)["versions"]["do"]


def test_the_doctor_names_workers_that_are_missing(
    run: Any, run_json: Any, sound: None, monkeypatch, local_server
) -> None:
    """A worker that does not answer is a finding of the doctor, and DOWN in the status."""
    group = local_server.catalog.group
    first, second = group.stats(1.0)
    monkeypatch.setattr(group, "stats", lambda timeout_s: [first, replace(second, stats=None)])
    document = run_json("doctor", code=1)
    assert wrong(document) == ["workers"]
    assert findings(document)["workers"]["found"] == "1 of 2 workers are up; no answer from worker 1"
    assert "DOWN" in run("status")[1]


def test_the_doctor_names_tables_whose_rows_are_lost(
    run_json: Any, sound: None, monkeypatch, local_server: Server, client: shardloss.LossClient, fresh_name
) -> None:
    """Lost rows are a finding even if the worker was restarted and is up."""
    name = client.create_table(fresh_name(), num_classes=2, dim=2).name
    (owner,) = (one for one in local_server.catalog.owners() if one.spec.name == name)
    monkeypatch.setattr(owner, "_lost", "a worker died")
    document = run_json("doctor", code=1)
    assert wrong(document) == ["workers"]
    assert findings(document)["workers"]["found"] == f"2 of 2 workers are up, but a worker died with rows of {name}"


@pytest.mark.parametrize("ahead_s", [3600.0, -3600.0])
def test_the_doctor_names_a_clock_that_is_wrong(run_json: Any, sound: None, monkeypatch, ahead_s: float) -> None:
    monkeypatch.setattr(admin, "time", SimpleNamespace(time=lambda: time.time() + ahead_s))
    document = run_json("doctor", code=1)
    assert wrong(document) == ["clock"]
    assert ("ahead of" if ahead_s > 0 else "behind") in findings(document)["clock"]["found"]


# What it needs


WITHOUT = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(name + " is not here", name=name)
sys.meta_path.insert(0, Block())
sys.argv = ["shardloss", "version"]
import shardloss.files
from shardloss.cli import main
main()
"""


@pytest.mark.parametrize(
    ("blocked", "code", "out", "err"),
    [
        ({"torch", "ray", "shardloss_server", "safetensors"}, 0, f"{shardloss.__version__}\n", ""),
        ({"typer"}, 1, "", "the command line needs the package typer: pip install 'shardloss[cli]'\n"),
        ({"rich"}, 1, "", "the command line needs the package rich: pip install 'shardloss[cli]'\n"),
    ],
)
def test_it_says_in_one_sentence_what_is_not_installed(blocked: set[str], code: int, out: str, err: str) -> None:
    """`version` needs no torch, Ray or server; without typer or rich the error says what to install, in one line."""
    script = WITHOUT.replace("{blocked}", repr(blocked))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (code, out, err)

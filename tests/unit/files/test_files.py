"""A table exported to a file and imported again is the same with any number of shards; bad files change nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.torch
import shardloss
import torch
from shardloss import errors, files, types
from shardloss.files import safetensors as layout
from shardloss_server.numerics.optimizer import state_widths
from shardloss_server.rpc import specs

from ...extent import EVERYTHING

V, D, N = 61, 5, 13  # odd, and not a multiple of 3 or 5 shards
RATE = 0.3
OPTIMIZERS: dict[str, types.Optimizer] = {
    "sgd": shardloss.Sgd(),
    "momentum": shardloss.Sgd(momentum=0.9),
    "adagrad": shardloss.Adagrad(initial_accumulator_value=0.1),
    "row_adagrad": shardloss.RowAdagrad(),
    "adam": shardloss.Adam(),
    "adamw": shardloss.AdamW(),
    "sparse_adam": shardloss.SparseAdam(),
}
# Tolerances after 7 commits, with losses of 4 to 8 nats. bfloat16 rows without biases are multiplied in bfloat16, and
# their logits depend on the number of shards by 2^-8 of their size, even if no file is involved.
TOLERANCE = {("float32", True): 1e-5, ("float64", True): 1e-12, ("bfloat16", True): 1e-4, ("bfloat16", False): 0.05}
CURVES = [
    *(("adam", dtype, True, "safetensors") for dtype in ("float32", "float64", "bfloat16")),
    *((name, "float32", True, "numpy") for name in ("momentum", "row_adagrad", "adamw")),
    ("momentum", "bfloat16", False, "numpy"),
    ("row_adagrad", "float64", True, "safetensors"),
]
Make = Callable[..., shardloss.Table]


@pytest.fixture
def make(client: shardloss.LossClient, fresh_name: Callable[[], str]) -> Make:
    """Return a function that creates a table of 3 shards with placement "mod"."""

    def make(**options: Any) -> shardloss.Table:
        return client.create_table(
            fresh_name(), **{"num_classes": V, "dim": D, "num_shards": 3, "placement": "mod"} | options
        )

    return make


def train(table: shardloss.Table, rng: np.random.Generator, num_steps: int = 7) -> np.ndarray:
    """Train for num_steps and return the losses [num_steps, N]; if labels are counted, every other step is sampled."""
    session, losses = table.session(), []
    sampled = shardloss.SampledSoftmax(num_sampled=20, sampler="learned_unigram", seed=3)
    for step in range(num_steps):
        hidden, labels = rng.normal(size=(N, table.spec.dim)), rng.integers(0, table.spec.num_classes, N)
        loss = sampled if step % 2 and table.spec.count_labels else shardloss.FullSoftmax()
        losses.append(session.train_step(hidden.astype(np.float32), labels, loss, learning_rate=RATE).loss)
    return np.array(losses)


def export_path(tmp_path: Path, format: str) -> Path:
    return tmp_path / ("table.safetensors" if format == "safetensors" else "table")


@pytest.mark.parametrize(("optimizer", "dtype", "bias", "format"), CURVES if EVERYTHING else CURVES[::2])
def test_a_table_goes_on_training_with_the_same_curve_on_another_cut(
    client: shardloss.LossClient, make: Make, tmp_path: Path, optimizer: str, dtype: str, bias: bool, format: str
) -> None:
    """A trained table and its copy, imported into 5 contiguous shards, have the same losses on the same batches."""
    table = make(dtype=dtype, bias=bias, optimizer=OPTIMIZERS[optimizer], count_labels=True)
    train(table, np.random.default_rng(1))
    path = export_path(tmp_path, format)
    files.export_table(table, path)
    other = files.import_table(client, path, f"{table.name}-5", num_shards=5, placement="div")
    assert (other.spec.num_shards, other.spec.placement) == (5, "div")
    np.testing.assert_array_equal(other.read_state(0, V).rows, table.read_state(0, V).rows)
    here, there = (train(one, np.random.default_rng(2)) for one in (table, other))
    np.testing.assert_allclose(there, here, rtol=0, atol=TOLERANCE[dtype, bias])
    assert other.info().num_commits == table.info().num_commits == 14


def test_a_curve_without_its_state_is_another(client: shardloss.LossClient, make: Make, tmp_path: Path) -> None:
    """A table imported without its optimizer state has another curve, so the test above does depend on the state."""
    table = make(optimizer=OPTIMIZERS["adam"], count_labels=True)
    train(table, np.random.default_rng(1))
    files.export_table(table, tmp_path / "t.safetensors")
    other = files.import_table(
        client,
        tmp_path / "t.safetensors",
        f"{table.name}-rows",
        weights_name="weights",
        biases_name="biases",
        optimizer=OPTIMIZERS["adam"],
        count_labels=True,
    )
    here, there = (train(one, np.random.default_rng(2)) for one in (table, other))
    assert np.abs(here[0] - there[0]).max() < 1e-5
    assert np.abs(here - there).max() > 0.01


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_client_and_server_agree_on_what_an_optimizer_holds(make: Make, name: str) -> None:
    """The client and the server expect the same names and widths of state for rows and biases."""
    spec = OPTIMIZERS[name]
    table = make(optimizer=spec)
    page = table.read_state(0, V)
    widths = types.state_widths(spec, D)
    message = shardloss.messages.table_spec("x", V, D, "float32", True, 1, "mod", None, spec, False)
    assert widths == state_widths(specs.table_spec(message, 1).optimizer, D)
    assert {name: value.shape for name, value in page.weight_state.items()} == {n: (V, w) for n, w in widths.items()}
    assert {name: value.shape for name, value in page.bias_state.items()} == dict.fromkeys(widths, (V, 1))


@pytest.mark.parametrize("format", ["safetensors", "numpy"])
def test_class_counts_come_along(client: shardloss.LossClient, make: Make, tmp_path: Path, format: str) -> None:
    """Written class counts and those learned from commits are exported and imported with the table."""
    table = make(count_labels=True)
    train(table, np.random.default_rng(1))
    table.write_class_counts(np.arange(V) * 0.5)
    files.export_table(table, export_path(tmp_path, format))
    other = files.import_table(client, export_path(tmp_path, format), f"{table.name}-b")
    here, there = table.read_class_counts(0, V), other.read_class_counts(0, V)
    assert here.learned is not None
    assert here.learned.sum() == V + 7 * N
    np.testing.assert_array_equal(there.learned, here.learned)
    np.testing.assert_array_equal(there.written, np.arange(V) * 0.5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_library_reads_what_we_write(make: Make, tmp_path: Path, dtype: str) -> None:
    """The safetensors library reads every tensor and the metadata of an exported file."""
    table = make(dtype=dtype, optimizer=OPTIMIZERS["adam"], count_labels=True)
    train(table, np.random.default_rng(1))
    path = tmp_path / "t.safetensors"
    exported = files.export_table(table, path)
    found, page = safetensors.torch.load_file(path), table.read_state(0, V)
    assert found["weights"].dtype == getattr(torch, dtype)
    read = table.read_rows(np.arange(V))
    np.testing.assert_array_equal(found["weights"].to(torch.float64).numpy(), read.rows.astype(np.float64))
    np.testing.assert_array_equal(found["biases"].numpy(), page.biases)
    for name in ("first_moment", "second_moment"):
        np.testing.assert_array_equal(found[f"state.weights.{name}"].numpy(), page.weight_state[name])
        np.testing.assert_array_equal(found[f"state.biases.{name}"].numpy(), page.bias_state[name])
    assert found["learned_counts"].sum() == V + 7 * N
    with safetensors.safe_open(path, "pt") as file:
        metadata = {name.removeprefix("shardloss."): json.loads(value) for name, value in file.metadata().items()}
    assert metadata["num_commits"] == 7
    assert metadata["spec"]["optimizer"]["kind"] == "adam"
    assert metadata["format_version"] == 1
    assert exported.num_bytes == sum(tensor.nbytes for tensor in found.values())


def test_numpy_reads_what_we_write(make: Make, tmp_path: Path) -> None:
    """An export in NumPy format is a folder of plain .npy arrays."""
    table = make(optimizer=OPTIMIZERS["row_adagrad"])
    train(table, np.random.default_rng(1))
    files.export_table(table, tmp_path / "t")
    page = table.read_state(0, V)
    np.testing.assert_array_equal(np.load(tmp_path / "t/weights.npy"), page.rows)
    np.testing.assert_array_equal(np.load(tmp_path / "t/state.weights.sum.npy"), page.weight_state["sum"])


def test_bfloat16_rows_keep_every_bit(make: Make) -> None:
    """bfloat16 rows are written and read bit by bit, including denormals, minus zero and the largest numbers."""
    table = make(dtype="bfloat16")
    bits = np.arange(V * D, dtype=np.uint16).reshape(V, D)
    bits[0] = (0x8000, 0x7F7F, 0xFF7F, 0x0001, 0x8001)
    page = table.read_state(0, V)
    table.write_state(0, replace(page, rows=bits))
    np.testing.assert_array_equal(table.read_state(0, V).rows, bits)


def test_an_import_leaves_no_failed_call_in_the_log(
    client: shardloss.LossClient, make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Looking whether the name is free is no error."""
    table = make()
    with caplog.at_level("DEBUG"):
        files.export_table(table, tmp_path / "t.safetensors")
        files.import_table(client, tmp_path / "t.safetensors", f"{table.name}-b")
        assert "call failed" not in caplog.text
        with pytest.raises(errors.TableNotFound):
            client.table("nowhere")
    assert "call failed" in caplog.text


def test_an_older_server_is_refused(
    client: shardloss.LossClient, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export and import refuse a server that would silently omit the optimizer state."""
    table = make()
    files.export_table(table, tmp_path / "t.safetensors")
    monkeypatch.setattr(client, "info", replace(client.info, features=("evaluate",)))
    for call in (
        lambda: files.export_table(table, tmp_path / "u.safetensors"),
        lambda: files.import_table(client, tmp_path / "t.safetensors", f"{table.name}-b"),
    ):
        with pytest.raises(errors.NotSupported, match="update it"):
            call()


# Concurrent training and interrupted transfers


def wide(make: Make) -> shardloss.Table:
    """Return a table of three pages."""
    table = make(num_classes=1500, dim=64, optimizer=OPTIMIZERS["adam"])
    assert 1500 / 3 <= table.page_rows < 1500 / 2
    return table


@pytest.mark.parametrize("format", ["safetensors", "numpy"])
def test_a_table_that_moves_is_no_export(make: Make, tmp_path: Path, format: str) -> None:
    """If the table changes, export raises TableMoved and leaves no file; with allow_moving it writes both versions."""
    table, path = wide(make), export_path(tmp_path, format)

    def step(done: int, _of: int) -> None:
        train(table, np.random.default_rng(done), 1)

    with pytest.raises(errors.TableMoved, match="version 0 to 1"):
        files.export_table(table, path, progress=step)
    assert list(tmp_path.iterdir()) == []
    exported = files.export_table(table, path, progress=step, allow_moving=True)
    assert (exported.version, exported.last_version) == (1, 3)
    facts = files.open_file(path).facts
    assert facts is not None
    assert (facts.version, facts.last_version, facts.num_commits) == (1, 3, 3)


def test_an_import_that_breaks_off_is_never_taken_for_a_table(
    client: shardloss.LossClient, make: Make, tmp_path: Path
) -> None:
    """An incomplete import stays under NAME.part, the error says how to continue, and a resumed import is complete."""
    table, path = wide(make), tmp_path / "t.safetensors"
    train(table, np.random.default_rng(1))
    files.export_table(table, path)
    name = f"{table.name}-b"

    def cut(done: int, _of: int) -> None:
        raise errors.ServerUnavailable("the cable is out")

    def interrupt(done: int, _of: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(errors.ServerUnavailable, match=rf"the cable is out; .*'{name}.part' is incomplete.*--resume"):
        files.import_table(client, path, name, progress=cut)
    with pytest.raises(errors.TableNotFound):
        client.table(name)
    with pytest.raises(errors.TableExists, match=r"interrupted.*--resume"):
        files.import_table(client, path, name)
    with pytest.raises(KeyboardInterrupt) as interrupted:
        files.import_table(client, path, name, resume=True, progress=interrupt)
    assert "is incomplete" in interrupted.value.__notes__[0]
    seen: list[tuple[int, int]] = []
    other = files.import_table(client, path, name, resume=True, progress=lambda done, of: seen.append((done, of)))
    assert other.name == name
    assert seen[-1] == (1500, 1500)
    np.testing.assert_array_equal(other.read_rows(np.arange(1500)).rows, table.read_rows(np.arange(1500)).rows)
    with pytest.raises(errors.TableExists, match="delete it"):
        files.import_table(client, path, name)
    assert f"{name}.part" not in [info.name for info in client.list_tables()]


def test_a_resumed_import_keeps_nothing_of_the_one_that_broke_off(
    client: shardloss.LossClient, make: Make, tmp_path: Path
) -> None:
    """Resuming with another file and another number of shards keeps no class counts of the first file."""
    first, second = make(), make()
    first.write_class_counts(np.arange(1.0, first.spec.num_classes + 1))
    for table in (first, second):
        files.export_table(table, tmp_path / table.name)
    name = f"{first.name}-b"

    def cut(done: int, _of: int) -> None:
        raise errors.ServerUnavailable("the cable is out")

    with pytest.raises(errors.ServerUnavailable):
        files.import_table(client, tmp_path / first.name, name, num_shards=2, progress=cut)
    other = files.import_table(client, tmp_path / second.name, name, num_shards=3, resume=True)
    assert other.spec.num_shards == 3
    assert other.read_class_counts(0, 1).written is None


def test_no_more_than_a_page_is_held(client: shardloss.LossClient, make: Make, tmp_path: Path) -> None:
    """Export and import of a table of 24 MB allocate less than 8 MiB at a time."""
    table = make(num_classes=15_000, dim=128, optimizer=OPTIMIZERS["adam"], bias=False)
    path = tmp_path / "t.safetensors"
    tracemalloc.start()
    try:
        num_bytes = files.export_table(table, path).num_bytes
        files.import_table(client, path, f"{table.name}-b")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 8 << 20
    assert num_bytes > 23e6


def test_an_export_replaces_only_what_it_is_told_to(make: Make, tmp_path: Path) -> None:
    """An existing file is kept unless overwrite is set, and a folder that contains other files is never replaced."""
    table = make()
    for name in ("t.safetensors", "t"):
        files.export_table(table, tmp_path / name)
        with pytest.raises(errors.BadFile, match="exists"):
            files.export_table(table, tmp_path / name)
        files.export_table(table, tmp_path / name, overwrite=True)
    (tmp_path / "t/letter.txt").write_text("dear")
    with pytest.raises(errors.BadFile, match=r"letter\.txt"):
        files.export_table(table, tmp_path / "t", overwrite=True)
    with pytest.raises(errors.BadFile, match="is not a folder"):
        files.export_table(table, tmp_path / "nowhere/t.safetensors")
    with pytest.raises(errors.BadFile, match="cannot be written: File name too long"):
        files.export_table(table, tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(errors.BadFile, match="pipe is neither a file nor a folder"):
        files.export_table(table, tmp_path / "pipe", overwrite=True)
    (tmp_path / "pipe").unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t", "t.safetensors"]


# Files from other sources


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_come_from_any_checkpoint(
    client: shardloss.LossClient, fresh_name: Callable[[], str], tmp_path: Path, dtype: torch.dtype
) -> None:
    """Rows are imported from a named tensor of any float dtype in a checkpoint with other tensors."""
    rows = torch.randn(V, D).to(dtype)
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"lm_head.weight": rows, "mask": torch.ones(3, dtype=torch.bool)}, path)
    with pytest.raises(errors.BadFile, match=r"lm_head\.weight"):  # lists the tensors that exist
        files.import_table(client, path, fresh_name())
    table = files.import_table(client, path, fresh_name(), weights_name="lm_head.weight")
    assert table.spec.dtype == {torch.float16: "float32"}.get(dtype, str(dtype).removeprefix("torch."))
    assert not table.spec.bias
    read = table.read_rows(np.arange(V)).rows
    np.testing.assert_array_equal(read.astype(np.float64), rows.double().numpy())


def test_rows_come_from_a_npy_file_in_another_dtype(
    client: shardloss.LossClient, fresh_name: Callable[[], str], tmp_path: Path, rng: np.random.Generator
) -> None:
    """Rows from a .npy file are converted to the new table's dtype; the caller chooses optimizer and biases."""
    rows = rng.normal(size=(V, D)).astype(np.float32)
    np.save(tmp_path / "w.npy", rows)
    adam = OPTIMIZERS["adam"]
    table = files.import_table(
        client, tmp_path / "w.npy", fresh_name(), dtype="bfloat16", bias=True, optimizer=adam, num_shards=4
    )
    assert (table.spec.dtype, table.spec.bias, table.spec.optimizer) == ("bfloat16", True, adam)
    expected = torch.from_numpy(rows).bfloat16().float().numpy()
    np.testing.assert_array_equal(table.read_rows(np.arange(V)).rows, expected)


def test_rows_that_cannot_be_stored_leave_no_table(
    client: shardloss.LossClient, fresh_name: Callable[[], str], tmp_path: Path
) -> None:
    """A value that is not finite raises InvalidArgument with its row and column, and no table remains."""
    rows = np.zeros((V, D), np.float32)
    rows[17, 2] = np.nan
    np.save(tmp_path / "w.npy", rows)
    name = fresh_name()
    with pytest.raises(errors.InvalidArgument, match=r"rows\[17, 2\] = nan is not finite"):
        files.import_table(client, tmp_path / "w.npy", name)
    assert not [info.name for info in client.list_tables() if info.name.startswith(name)]


# Hostile files


def header(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the safetensors file `raw` with its header changed."""
    length = struct.unpack("<Q", raw[:8])[0]
    entries = json.loads(raw[8 : 8 + length])
    change(entries)
    new = json.dumps(entries).encode()
    return struct.pack("<Q", len(new)) + new + raw[8 + length :]


def facts(raw: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Return the safetensors file `raw` with its table's metadata changed."""

    def rewrite(entries: dict[str, Any]) -> None:
        metadata = entries["__metadata__"]
        found = {name: json.loads(value) for name, value in metadata.items()}
        change(found)
        entries["__metadata__"] = {name: json.dumps(value) for name, value in found.items()}

    return header(raw, rewrite)


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "not a safetensors file"),
    "text": (lambda raw: b"hello, this is no table at all", "not a safetensors file"),
    "cut off": (lambda raw: raw[:-1], "it was cut off"),
    "cut in the header": (lambda raw: raw[:40], "was cut off: its header alone takes"),
    "longer": (lambda raw: raw + b"x", "something follows"),
    "absurd header": (lambda raw: struct.pack("<Q", 1 << 62) + raw[8:], "has a header of 4611686018427387904 bytes"),
    "deep header": (lambda raw: struct.pack("<Q", 200_000) + b"[" * 200_000, "not JSON"),
    "no object": (lambda raw: struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "name twice": (lambda raw: struct.pack("<Q", 19) + b'{"a": {}, "a" : {}}', "twice"),
    "negative": (lambda raw: header(raw, lambda h: h["weights"].update(shape=[-1, 5])), "malformed shape"),
    "huge": (lambda raw: header(raw, lambda h: h["weights"].update(shape=[1 << 62, 1 << 62])), "impossible shape"),
    "shape": (lambda raw: header(raw, lambda h: h["weights"].update(shape=[V, 6])), "do not fit"),
    "turned": (lambda raw: header(raw, lambda h: h["weights"].update(shape=[D, V])), "needs float32"),
    "dtype": (lambda raw: header(raw, lambda h: h["weights"].update(dtype="I32")), "needs float32"),
    "overlap": (lambda raw: header(raw, lambda h: h["biases"].update(data_offsets=[0, 4 * V])), "overlap"),
    "entry": (lambda raw: header(raw, lambda h: h.update(weights=3)), "is not a tensor"),
    "missing": (lambda raw: header(raw, lambda h: h.update(words=h.pop("weights"))), "lacks weights"),
    "metadata": (lambda raw: header(raw, lambda h: h.update(__metadata__={"a": 1})), "not a map of strings"),
    "facts": (lambda raw: header(raw, lambda h: h["__metadata__"].update({"shardloss.spec": "{"})), "not JSON"),
    "version": (lambda raw: facts(raw, lambda f: f.update({"shardloss.format_version": 2})), "format version 2"),
    "commits": (lambda raw: facts(raw, lambda f: f.update({"shardloss.num_commits": -1})), "num_commits"),
    "optimizer": (lambda raw: facts(raw, lambda f: f["shardloss.spec"].update(optimizer={"kind": "os"})), "one of sgd"),
    "state": (lambda raw: facts(raw, lambda f: f["shardloss.spec"].update(optimizer=SGD)), "belongs to no table"),
    "rows": (lambda raw: facts(raw, lambda f: f["shardloss.spec"].update(num_classes=V + 1)), "needs float32"),
}
SGD = {"kind": "sgd", "momentum": 0.0, "weight_decay": 0.0, "nesterov": False}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_bad_file_is_refused_before_anything_is_made(
    client: shardloss.LossClient, make: Make, tmp_path: Path, kind: str
) -> None:
    """BadFile names the file and what is wrong with it, and no complete or partial table exists."""
    table, path = make(optimizer=OPTIMIZERS["adam"]), tmp_path / "t.safetensors"
    files.export_table(table, path)
    spoil, complaint = HOSTILE[kind]
    path.write_bytes(spoil(path.read_bytes()))
    name = f"{table.name}-b"
    with pytest.raises(errors.BadFile, match=complaint) as refused:
        files.import_table(client, path, name)
    assert str(path) in refused.value.message
    assert not [info.name for info in client.list_tables() if info.name.startswith(name)]


def saved(array: Any, **options: Any) -> bytes:
    """Return the content of a .npy file."""
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


class Bomb:
    """An object that fails the test if it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("unpickled",)


HOSTILE_NPY: dict[str, tuple[Callable[[], bytes], str]] = {
    "pickled": (lambda: saved(np.array([[Bomb()]], dtype=object), allow_pickle=True), "pickled objects"),
    "a pickle": (lambda: pickle.dumps(Bomb()), "not a .npy file"),
    "cut off": (lambda: saved(np.zeros((V, D), np.float32))[:-3], "cut off"),
    "longer": (lambda: saved(np.zeros((V, D), np.float32)) + b"x", "something follows the array"),
    "fortran": (lambda: saved(np.asfortranarray(np.zeros((V, D), np.float32))), "Fortran"),
    "integers": (lambda: saved(np.zeros((V, D), np.int64)), "one of float32"),
    "complex": (lambda: saved(np.zeros((V, D), complex)), "<c16"),
    "rank": (lambda: saved(np.zeros(V, np.float32)), "rank 2"),
    "scalar": (lambda: saved(np.float32(1)), "rank 2"),
    "code": (lambda: b"\x93NUMPY\x01\x00\x20\x00__import__('os').abort()".ljust(42), "not a .npy file"),
    "negative": (
        lambda: (
            b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5), }".ljust(70)
        ),
        "-1 is not a size",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE_NPY)
def test_a_bad_npy_file_is_refused_and_never_unpickled(
    client: shardloss.LossClient, fresh_name: Callable[[], str], tmp_path: Path, kind: str
) -> None:
    """A malformed or pickled .npy file raises BadFile, and no pickle is ever loaded."""
    content, complaint = HOSTILE_NPY[kind]
    (tmp_path / "w.npy").write_bytes(content())
    with pytest.raises(errors.BadFile, match=complaint):
        files.import_table(client, tmp_path / "w.npy", fresh_name())


def test_a_bad_folder_is_refused(client: shardloss.LossClient, make: Make, tmp_path: Path) -> None:
    """A folder with a bad or missing spec, an extra or missing array, or an array of another dtype raises BadFile."""
    table, path = make(), tmp_path / "t"
    files.export_table(table, path)
    weights, spec = (path / "weights.npy").read_bytes(), (path / "spec.json").read_text()
    for name, content, complaint in (
        ("more.npy", weights, "'more' belongs to no table"),
        ("weights.npy", saved(np.zeros((V, D))), "needs float32"),
        ("spec.json", "[" * 100_000, "not JSON"),
        ("spec.json", json.dumps(json.loads(spec) | {"spec": {}}), "name is 'None'"),
    ):
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(errors.BadFile, match=complaint):
            files.import_table(client, path, f"{table.name}-b")
        (path / "weights.npy").write_bytes(weights)
        (path / "more.npy").unlink(missing_ok=True)
    for name, complaint in (("weights.npy", "lacks weights"), ("spec.json", "cannot be read")):
        (path / "spec.json").write_text(spec)
        (path / name).unlink()
        with pytest.raises(errors.BadFile, match=complaint):
            files.import_table(client, path, f"{table.name}-b")
    with pytest.raises(errors.BadFile, match="does not exist"):
        files.open_file(tmp_path / "nothing.npy")


def test_a_full_disk_shows_before_the_first_page(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the disk is too small, the error says how many bytes are needed, and no file is left."""

    def full(_file: int, _offset: int, _length: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    for name in ("t.safetensors", "t"):
        with pytest.raises(errors.BadFile, match=r"takes \d+ bytes, but its file system has \d+ free"):
            files.export_table(make(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_header_keeps_its_length_when_it_is_sealed(tmp_path: Path) -> None:
    """The header's length allows its numbers to grow to 19 digits."""
    spec = files.importing.types.TableInfo(
        "t", 1, 1, "float32", False, 1, "mod", types.Zeros(), types.Sgd(), False, 0, 0, 0
    )
    first = files.exporting.Facts(spec, 0, 0, 0)
    part = tmp_path / "t"
    tensors = layout.begin(part, files.exporting.shapes(spec, False), first)
    tensors["weights"].write(0, np.ones((1, 1), np.float32))
    last = first.moved_to((1 << 63) - 1, 1 << 62)
    layout.seal(part, last)
    assert layout.opened(part)[0] == replace(last, spec=replace(spec, version=0, num_commits=1 << 62))
    assert safetensors.torch.load_file(part)["weights"].item() == 1.0


# What the wire refuses


def changed(page: types.TableRows, **changes: Any) -> types.TableRows:
    return replace(page, **changes)


@pytest.mark.parametrize(
    ("change", "field", "complaint"),
    [
        ({"weight_state": {"sum": np.zeros((V, D))}}, "weight_state", "adam has first_moment, second_moment"),
        ({"weight_state": {"first_moment": np.zeros((V, 1))}}, "weight_state[0].values", r"floats \[61, 5\]"),
        ({"weight_state": {"first_moment": np.zeros((V - 1, D))}}, "weight_state[0].values", r"floats \[61, 5\]"),
        ({"weight_state": {"first_moment": np.zeros((V, D), int)}}, "weight_state[0].values", "int64"),
        ({"bias_state": {"second_moment": np.full((V, 1), -1.0)}}, "bias_state[0].values", "is negative"),
        ({"weight_state": {"first_moment": np.full((V, D), np.inf)}}, "weight_state[0].values", "is not finite"),
        ({"weight_state": {"first_moment": np.full((V, D), 1e300)}}, "weight_state[0].values", "is not finite"),
    ],
)
def test_bad_state_is_refused_whole(make: Make, change: dict[str, Any], field: str, complaint: str) -> None:
    """InvalidArgument names the field, and neither rows nor state nor version change."""
    table = make(optimizer=OPTIMIZERS["adam"])
    train(table, np.random.default_rng(1), 2)
    before = table.read_state(0, V)
    new = changed(before, rows=before.rows + 1, **change)
    with pytest.raises(errors.InvalidArgument, match=complaint) as refused:
        table.write_state(0, new, num_commits=9)
    assert refused.value.field == field
    after = table.read_state(0, V)
    assert (after.version, after.num_commits) == (before.version, 2)
    np.testing.assert_array_equal(after.rows, before.rows)
    np.testing.assert_array_equal(after.weight_state["first_moment"], before.weight_state["first_moment"])


def test_state_that_is_not_given_stays(make: Make) -> None:
    """Rows, state and step can be written separately; each write adds a version and leaves the rest unchanged."""
    table = make(optimizer=OPTIMIZERS["adam"])
    train(table, np.random.default_rng(1), 2)
    before = table.read_state(0, V)
    first = before.weight_state["first_moment"] * 2
    assert table.write_state(0, changed(before, weight_state={"first_moment": first}, bias_state={}, biases=None)) == 3
    after = table.read_state(0, V)
    np.testing.assert_array_equal(after.weight_state["first_moment"], first)
    np.testing.assert_array_equal(after.weight_state["second_moment"], before.weight_state["second_moment"])
    np.testing.assert_array_equal(after.biases, before.biases)
    empty = types.TableRows(np.zeros((0, D), np.float32), None, {}, {}, 0, 0)
    assert table.write_state(0, empty) == 3
    assert table.write_state(0, empty, num_commits=100) == 4
    assert (table.info().num_commits, table.read_state(0, 1).num_commits) == (100, 100)
    for wrong in (-1, (1 << 62) + 1):
        with pytest.raises(errors.InvalidArgument, match="num_commits"):
            table.write_state(0, empty, num_commits=wrong)


def test_a_table_without_biases_takes_none_of_their_state(make: Make) -> None:
    table = make(optimizer=OPTIMIZERS["adam"], bias=False)
    page = table.read_state(0, V)
    assert page.biases is None
    assert page.bias_state == {}
    with pytest.raises(errors.InvalidArgument, match="no biases") as refused:
        table.write_state(0, changed(page, bias_state={"first_moment": np.zeros((V, 1))}))
    assert refused.value.field == "bias_state"


def test_learned_counts_are_checked(make: Make) -> None:
    """Learned counts must be integers of at least 1 whose sum is in range, for a table that counts its labels."""
    table = make(count_labels=True)
    train(table, np.random.default_rng(1), 3)
    before = table.read_class_counts(0, V).learned
    for wrong, complaint in (
        (np.zeros(2, np.int64), r"learned\[0\] = 0 must be at least 1"),
        (np.full(2, 1 << 62), "2\\^62"),
        (np.ones(2), "float64"),
        (np.ones((2, 2), np.int64), r"\[M\] is needed"),
    ):
        with pytest.raises(errors.InvalidArgument, match=complaint) as refused:
            table._write_counts_page(3, None, wrong)
        assert refused.value.field == "learned"
    with pytest.raises(errors.InvalidArgument, match="exceeds the table's 61 classes"):
        table._write_counts_page(V - 1, None, np.ones(2, np.int64))
    with pytest.raises(errors.InvalidArgument, match="exceeds the table's 61 classes"):
        table.read_class_counts(V, 1)
    with pytest.raises(errors.InvalidArgument, match="counts"):
        table._write_counts_page(0, None, None)
    np.testing.assert_array_equal(table.read_class_counts(0, V).learned, before)
    with pytest.raises(errors.InvalidArgument, match="count_labels"):
        make()._write_counts_page(0, None, np.ones(2, np.int64))


def test_too_many_rows_with_state_are_refused_before_they_are_read(make: Make) -> None:
    table = make(num_classes=4000, dim=64, optimizer=OPTIMIZERS["adam"])
    with pytest.raises(errors.LimitExceeded, match="read fewer"):
        table.read_state(0, 4000)


def test_a_renamed_table_is_the_same_table(client: shardloss.LossClient, make: Make) -> None:
    """A renamed table keeps its rows and step, and its old name is free; a taken or invalid new name is refused."""
    table, other = make(), make()
    train(table, np.random.default_rng(1), 2)
    rows = table.read_rows(np.arange(V)).rows
    new = client.rename_table(table.name, f"{table.name}-new")
    assert (new.spec.num_commits, new.spec.name) == (2, f"{table.name}-new")
    np.testing.assert_array_equal(new.read_rows(np.arange(V)).rows, rows)
    train(new, np.random.default_rng(2), 2)
    with pytest.raises(errors.TableNotFound):
        client.rename_table(table.name, "x")
    with pytest.raises(errors.TableExists):
        client.rename_table(new.name, other.name)
    with pytest.raises(errors.InvalidArgument) as refused:
        client.rename_table(new.name, "../etc")
    assert refused.value.field == "new_name"
    assert client.rename_table(new.name, new.name).name == new.name
    client.create_table(table.name, num_classes=2, dim=2)

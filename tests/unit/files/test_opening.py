"""A file is opened by its content: sharded checkpoints by their index; whatever else is named for what it is."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import shardloss
import torch
from shardloss import errors, files

V, D = 7, 3
ROWS = np.arange(V * D, dtype=np.float32).reshape(V, D)
HEAD = "lm_head.weight"


class Silent(SimpleNamespace):
    """A client that fails the test if anything is asked of its server."""

    info = SimpleNamespace(features=("table_state",), version="0")


def refusal(path: Path, **options: Any) -> str:
    """Return the message with which an import refuses a file: one line, before anything is sent."""
    with pytest.raises(errors.BadFile) as refused:
        files.import_table(Silent(), path, "words", **{"weights_name": HEAD} | options)  # type: ignore[arg-type]
    assert "\n" not in refused.value.message
    assert str(path) in refused.value.message
    return refused.value.message


# Sharded checkpoints


def checkpoint(folder: Path, shards: dict[str, dict[str, np.ndarray]], **wrong: str) -> Path:
    """Write a sharded checkpoint and return its index; `wrong` replaces the shards of tensors in the index."""
    folder.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        safetensors.numpy.save_file(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors} | wrong
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SHARDS = {FIRST: {"embed": ROWS + 1, "bias": ROWS[:, 0].copy()}, SECOND: {HEAD: ROWS}}


@pytest.mark.parametrize("form", ["index", "folder", "text", "link"])
def test_a_sharded_checkpoint_is_imported_by_its_index(
    client: shardloss.LossClient, fresh_name: Callable[[], str], tmp_path: Path, form: str
) -> None:
    """Rows and biases of different shards make one table; a cache that links to its files elsewhere is read as well."""
    index = checkpoint(tmp_path / "model", SHARDS)
    if form == "link":  # as Hugging Face's cache: snapshots/REVISION/NAME -> ../../blobs/HASH
        snapshot = tmp_path / "snapshot"
        snapshot.mkdir()
        for number, file in enumerate(sorted(index.parent.iterdir())):
            (snapshot / file.name).symlink_to(file.rename(tmp_path / f"blob{number}"))
        index = snapshot / index.name
    path = {"folder": index.parent, "text": str(index)}.get(form, index)
    table = files.import_table(client, path, fresh_name(), weights_name=HEAD, biases_name="bias")
    read = table.read_rows(np.arange(V))
    np.testing.assert_array_equal(read.rows, ROWS)
    np.testing.assert_array_equal(read.biases, ROWS[:, 0])


def test_a_shard_that_is_not_needed_may_be_missing(tmp_path: Path) -> None:
    """Only the shards of the tensors that are asked for are opened."""
    index = checkpoint(tmp_path, SHARDS)
    (tmp_path / FIRST).unlink()
    np.testing.assert_array_equal(files.open_file(index).tensor(HEAD, "rows", 2).read(0, V), ROWS)
    assert f"{tmp_path / FIRST} does not exist" in refusal(tmp_path, weights_name="embed")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/../../x", "", ".", "a\0b", "\ud800"])
def test_an_index_names_no_file_outside_its_folder(tmp_path: Path, name: str) -> None:
    safetensors.numpy.save_file({HEAD: ROWS}, tmp_path / "x.safetensors")
    index = checkpoint(tmp_path / "model", {}, **{HEAD: name})
    assert f"names the file {name!r}, which is not in its folder" in refusal(index)


def test_an_index_that_its_shards_do_not_bear_out_is_refused(tmp_path: Path) -> None:
    index = checkpoint(tmp_path, SHARDS, **{"moved": FIRST, "old": "pytorch_model.bin", "long": "x" * 300})
    assert "cannot be read: File name too long" in refusal(tmp_path, weights_name="long")
    torch.save({"old": torch.ones(2, 2)}, tmp_path / "pytorch_model.bin")
    assert f"{FIRST} has no tensor 'moved'" in refusal(tmp_path, weights_name="moved")
    assert "pytorch_model.bin is not a safetensors file but a PyTorch checkpoint" in refusal(
        tmp_path, weights_name="old"
    )
    assert "it has lm_head.weight, " in refusal(index, weights_name="head.weight")
    assert "is float32 [7]; rows (--weights-name) must have rank 2" in refusal(tmp_path, weights_name="bias")
    for text, complaint in (
        ("{}", "no weight_map"),
        ('{"weight_map": {"a": 1}}', "no weight_map"),
        ("[]", "not a JSON object"),
        ('{"weight_map": {"a": "b", "a": "c"}}', "'a' occurs twice"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ):
        index.write_text(text)
        assert complaint in refusal(index)
    index.write_text('{"weight_map": {}}', encoding="utf-16")
    assert "is in UTF-16" in refusal(index)


def test_a_folder_must_say_which_file_to_read(tmp_path: Path) -> None:
    """One safetensors file or one index is read; of several, and of none, the error names what is there."""
    assert "contains no exported table" in refusal(tmp_path)
    torch.save(torch.ones(2), tmp_path / "pytorch_model.bin")
    assert "pytorch_model.bin is a PyTorch checkpoint" in refusal(tmp_path)
    safetensors.numpy.save_file({HEAD: ROWS}, tmp_path / "model.safetensors")
    assert files.open_file(tmp_path).tensor(HEAD, "rows", 2).num_rows == V
    checkpoint(tmp_path, {})
    assert "contains model.safetensors.index.json and model.safetensors: name the one to read" in refusal(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "consolidated.safetensors")
    assert files.open_file(tmp_path).path.name == "model.safetensors.index.json"


# Other formats


def zipped(*names: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return stream.getvalue()


def by(save: Callable[..., object], *values: Any, **options: Any) -> bytes:
    """Return what `save` writes to a stream."""
    stream = io.BytesIO()
    save(*(stream if value is STREAM else value for value in values), **options)
    return stream.getvalue()


STREAM = object()
FOREIGN: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "zip": ("pytorch_model.bin", lambda: by(torch.save, {HEAD: torch.ones(2, 2)}, STREAM), "PyTorch checkpoint"),
    "old": (
        "model.pt",
        lambda: by(torch.save, {HEAD: torch.ones(2)}, STREAM, _use_new_zipfile_serialization=False),
        "PyTorch checkpoint",
    ),
    "renamed": ("model.safetensors", lambda: by(torch.save, torch.ones(2), STREAM), "PyTorch checkpoint"),
    "pickle": ("model.safetensors", lambda: pickle.dumps({"a": 1}), "pickle"),
    "pickle 0": ("model.pkl", lambda: pickle.dumps({"a": 1}, 0), "pickle"),
    "paddle": ("model.pdparams", lambda: pickle.dumps({"a": 1}, 2), "Paddle checkpoint"),
    "gguf": ("llama.gguf", lambda: b"GGUF" + struct.pack("<IQQ", 3, 1, 1), "GGUF"),
    "h5": ("model.h5", lambda: b"\x89HDF\r\n\x1a\n" + bytes(40), "HDF5"),
    "npz": ("rows.npz", lambda: by(np.savez, STREAM, a=ROWS), "archive of NumPy arrays"),
    "npz as npy": ("rows.npy", lambda: by(np.savez, STREAM, a=ROWS), "not a .npy file but an archive of NumPy arrays"),
    "onnx": ("model.onnx", lambda: b"\x08\x08\x12\x07pytorch\x1a\x032.1:" + bytes(30), "ONNX"),
    "keras": ("model.keras", lambda: zipped("metadata.json", "model.weights.h5"), "Keras"),
    "archive": ("model.zip", lambda: zipped("README.md"), "zip archive"),
    "tflite": ("m.tflite", lambda: b"\x1c\0\0\0TFL3" + bytes(30), "TensorFlow Lite"),
    "tensorflow": ("model.ckpt.data-00000-of-00001", lambda: np.random.default_rng(0).bytes(99), "TensorFlow"),
    "flax": ("flax_model.msgpack", lambda: b"\x81\xa6params\x81\xa1a" + bytes(30), "Flax"),
    "gzip": ("model.safetensors.gz", lambda: b"\x1f\x8b\x08" + bytes(30), "gzip: decompress it"),
    "lfs": ("model.safetensors", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "page": ("model.safetensors", lambda: b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "text": ("glove.txt", "der 0.25 0.5\nfür 0.1 0.2\n".encode, "but text: save the rows with numpy.save"),
    "config": ("config.json", lambda: b'{"hidden_size": 4}', "not the index of a checkpoint"),
    "empty": ("model.safetensors", lambda: b"", "but empty"),
    "zeros": ("model.safetensors", lambda: bytes(100), "zero bytes"),
    "random": ("weights", lambda: b"\x00\xff" + np.random.default_rng(1).bytes(200), "does not begin with a header"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_another_format_is_named(tmp_path: Path, kind: str) -> None:
    """The error says what the file is and what to do, and nothing of it is unpickled or unpacked."""
    name, content, complaint = FOREIGN[kind]
    (tmp_path / name).write_bytes(content())
    assert complaint in refusal(tmp_path / name)


def test_what_is_not_a_file_is_not_read(tmp_path: Path) -> None:
    """Pipes and devices, which may never end, are refused; so are links to nothing, and names that no file can have."""
    os.mkfifo(tmp_path / "pipe")
    assert "is not a regular file" in refusal(tmp_path / "pipe")
    assert "is not a regular file" in refusal(Path("/dev/zero"))
    (tmp_path / "link").symlink_to("blobs/gone")
    assert "is a link to blobs/gone, which does not exist" in refusal(tmp_path / "link")
    (tmp_path / "loop").symlink_to("loop")
    assert refusal(tmp_path / "loop")
    assert "cannot be read" in refusal(tmp_path / ("x" * 300))


# Hostile headers


def tensors(**entries: Any) -> bytes:
    """Return a safetensors header with these entries, and 84 bytes of tensors."""
    return measured(json.dumps({HEAD: {"dtype": "F32", "shape": [V, D], "data_offsets": [0, 84]} | entries}).encode())


def measured(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(84)


TEXT = tensors()[8:-84].decode()
HEADERS: dict[str, tuple[bytes, str]] = {
    "utf-16": (measured(TEXT.encode("utf-16")), "is in UTF-16"),
    "utf-16 without a mark": (measured(TEXT.encode("utf-16-le")), "is in UTF-16 or UTF-32"),
    "utf-32": (measured(TEXT.encode("utf-32")), "is in UTF-32"),
    "mark": (measured(TEXT.encode("utf-8-sig")), "byte order mark"),
    "latin-1": (measured(TEXT.replace("lm", "é").encode("latin-1")), "is not JSON"),
    "blank": (measured(b" " + TEXT.encode()), "must begin with {"),
    "nan": (measured(TEXT.replace("84", "NaN").encode()), "NaN is not a number"),
    "twice": (measured(TEXT[:-1].encode() + b"," + TEXT[1:].encode()), "'lm_head.weight' occurs twice"),
    "twice inside": (measured(TEXT.replace('"dtype"', '"shape": [1], "dtype"').encode()), "'shape' occurs twice"),
    "digits": (measured(TEXT.replace("84", "9" * 5000).encode()), "is not JSON"),
    "long": (struct.pack("<Q", 10**8 + 1) + b'{"a"' + bytes(99), "header of 100000001 bytes; at most 100000000"),
    "cut off": (tensors()[:50], "was cut off: its header alone takes"),
    "lacked": (tensors(dtype="I16", shape=[V, 2 * D]), "is I16 [7, 6]; its dtype must be one of float32"),
    "lacked float": (tensors(dtype="F8_E4M3", shape=[4 * V, D]), "is F8_E4M3 [28, 3]; its dtype must be one of"),
    "of four bits": (tensors(dtype="F4", shape=[8 * V, D]), "is F4 [56, 3]; its dtype must be one of"),
    "misfit": (tensors(dtype="U8"), "do not fit U8 [7, 3]"),
    "integers": (tensors(dtype="I32"), "is int32 [7, 3]; its dtype must be one of"),
    "unknown": (tensors(dtype="F128"), "is F128 [7, 3]"),
    "dtype in lines": (tensors(dtype="F32\n"), "no valid dtype"),
    "no dtype": (tensors(dtype=None), "no valid dtype"),
    "scalar": (tensors(shape=[], dtype="F9"), "is F9 []; rows (--weights-name) must have rank 2"),
    "no rows": (tensors(shape=[0, D], data_offsets=[0, 0])[:-84], "is float32 [0, 3]; rows"),
    "backwards": (tensors(data_offsets=[84, 0]), "impossible"),
    "outside": (tensors(data_offsets=[84, 168]), "gap at byte 0"),
    "beyond": (tensors()[:-4], "was cut off"),
    "far": (tensors(data_offsets=[0, 1 << 63]), "malformed"),
    "ranks": (tensors(shape=[1] * 65), "impossible"),
    "half": (tensors(shape=[7.0, 3]), "malformed"),
    "true": (tensors(shape=[True, 21]), "malformed"),
    "name in lines": (measured(b'{"a\\nb": 3}'), "entry 'a\\nb' is not a tensor"),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header_is_refused_for_its_true_reason(tmp_path: Path, kind: str) -> None:
    content, complaint = HEADERS[kind]
    (tmp_path / "model.safetensors").write_bytes(content)
    assert complaint in refusal(tmp_path / "model.safetensors")


def test_a_tensor_of_a_dtype_that_is_not_read_is_listed_and_refused(tmp_path: Path) -> None:
    """A mask beside the rows does no harm until it is read."""
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({HEAD: ROWS, "mask": ROWS > 3}, path)
    opened = files.open_file(path)
    assert str(opened.tensors["mask"].shape) == "BOOL [7, 3]"
    np.testing.assert_array_equal(opened.tensors[HEAD].read(0, V), ROWS)
    with pytest.raises(errors.BadFile, match=r"'mask' is BOOL \[7, 3\]; only float64"):
        opened.tensors["mask"].read(0, 1)


def npy(header: str, version: int = 1, length: int | None = None) -> bytes:
    raw = header.encode()
    size = struct.pack("<H" if version == 1 else "<I", len(raw) if length is None else length)
    return b"\x93NUMPY" + bytes([version, 0]) + size + raw + bytes(84)


def array(shape: str = "(7, 3)", descr: str = "'<f4'", fortran: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}"


ARRAYS: dict[str, tuple[bytes, str]] = {
    "huge header": (npy(array().ljust(20_000)), "has a header of 20000 bytes; at most 10000 are read"),
    "endless header": (npy(array(), 2, 1 << 31), "has a header of 2147483648 bytes"),
    "cut off": (npy(array(), 1, 9000), "was cut off: its header alone takes 9000 bytes"),
    "cut short": (b"\x93NUMPY\x01", "no complete header"),
    "version": (npy(array(), 4), "has version 4.0 of the .npy format"),
    "negative": (npy(array("(-7, 3)")), "has the shape (-7, 3), in which -7 is not a size"),
    "both negative": (npy(array("(-7, -3)")), "in which -7 is not a size"),
    "true": (npy(array("(True, 21)")), "in which True is not a size"),
    "enormous": (npy(array("(1 << 70, 3)")), "not a dictionary"),
    "overflow": (npy(array(f"({1 << 62}, {1 << 62})")), "it was cut off"),
    "far": (npy(array(f"({1 << 70}, 3)")), "is not a size"),
    "list": (npy(array("[7, 3]")), "malformed shape"),
    "order": (npy(array(fortran="0")), "malformed shape or order"),
    "fortran": (npy(array(fortran="True")), "is in Fortran order"),
    "objects": (npy(array(descr="'|O'")), "contains pickled objects"),
    "big-endian": (npy(array(descr="'>f4'")), "is big-endian (>f4): save array.astype('<f4')"),
    "records": (npy(array(descr="[('a', '<f4')]")), "records of several fields"),
    "string": (npy(array(descr="'<U3'")), "has dtype '<U3'"),
    "old string": (npy(array(descr="'a4'")), "has dtype 'a4'"),
    "number": (npy(array(descr="5")), "records"),
    "empty": (npy(array("(0, 3)"))[:-84], "is float32 [0, 3]; rows"),
    "scalar": (npy(array("()"))[:-80], "is float32 []; rows"),
    "short": (npy(array("(8, 3)")), "float32 [8, 3] takes 96 bytes, but the file has 84: it was cut off"),
    "longer": (npy(array("(6, 3)")), "something follows the array"),
    "escape": (npy(array(descr=r"'\d'")), "not a dictionary"),
    "deep": (npy("(" * 5000), "not a dictionary"),
    "code": (npy("__import__('os').abort()"), "not a dictionary"),
    "keys": (npy("{'descr': '<f4'}"), "not a dictionary"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_a_hostile_array_is_refused_for_its_true_reason(tmp_path: Path, kind: str) -> None:
    """No warning and no advice of NumPy is printed; the reason is one line."""
    content, complaint = ARRAYS[kind]
    (tmp_path / "rows.npy").write_bytes(content)
    assert complaint in refusal(tmp_path / "rows.npy", weights_name=None)


@pytest.mark.parametrize(
    "content",
    [npy(array(), version) for version in (1, 2, 3)]
    + [npy(array("(7L, 3L)")), npy("{'shape':(7,3),'fortran_order':False,'descr':'<f4'}\n")],
)
def test_what_other_programs_write_is_read(tmp_path: Path, content: bytes) -> None:
    """All versions of the format, long integers of Python 2, and other orders of the keys; the suffix is not needed."""
    (tmp_path / "rows").write_bytes(content)
    assert files.open_file(tmp_path / "rows").tensor("weights", "rows", 2).num_rows == V


def test_the_header_s_length_is_never_taken_for_a_bracket(tmp_path: Path) -> None:
    """A safetensors file whose header has 123 bytes begins with {, as an index does."""
    entry = {HEAD: {"dtype": "F32", "shape": [V, D], "data_offsets": [0, 84]}}
    path = tmp_path / "weights"
    path.write_bytes(measured(json.dumps(entry).encode().ljust(123)))
    assert path.read_bytes()[:1] == b"{"
    assert files.open_file(path).tensor(HEAD, "rows", 2).num_rows == V

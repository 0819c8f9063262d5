"""The formats of files that cannot be read, named in errors: by their first bytes, or else by their suffix."""

from __future__ import annotations

import codecs
from pathlib import Path

HEAD_BYTES = 512
CONVERT = "save its tensors with safetensors"
PYTORCH = "a PyTorch checkpoint (pickle), which is never read because loading it can run code", CONVERT
PADDLE = "a Paddle checkpoint (pickle), which is never read because loading it can run code", CONVERT
GGUF, HDF5, ONNX = ("a GGUF file", "use the model's safetensors files"), ("an HDF5 file", CONVERT), ("ONNX", CONVERT)
TFLITE, NPZ = ("a TensorFlow Lite model", CONVERT), ("an archive of NumPy arrays", "save one array with numpy.save")
TENSORFLOW, KERAS = ("a TensorFlow checkpoint or graph", CONVERT), ("a Keras model", CONVERT)
HTML = "an HTML page, such as a failed download leaves", "download the file again"
MAGIC = {
    b"GGUF": GGUF,
    b"\x89HDF\r\n\x1a\n": HDF5,
    b"\x93NUMPY": ("a .npy array", "name it .npy"),
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch the file with git lfs pull"),
    b"\x1f\x8b": ("compressed with gzip", "decompress it"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "decompress it"),
    b"\xfd7zXZ\0": ("compressed with xz", "decompress it"),
    b"BZh": ("compressed with bzip2", "decompress it"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "unpack it"),
    b"PAR1": ("a Parquet file", "save its columns with numpy.save"),
    b"ARROW1": ("an Arrow file", "save its columns with numpy.save"),
    b"<!DOCTYPE": HTML,
    b"<!doctype": HTML,
    b"<html": HTML,
    **{b"\x80" + bytes([protocol]): PYTORCH for protocol in range(2, 6)},
}
SUFFIXES = {
    **dict.fromkeys((".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"), PYTORCH),
    **dict.fromkeys((".pdparams", ".pdopt"), PADDLE),
    **dict.fromkeys((".pb", ".index", ".meta"), TENSORFLOW),
    **dict.fromkeys((".h5", ".hdf5"), HDF5),
    ".gguf": GGUF,
    ".onnx": ONNX,
    ".tflite": TFLITE,
    ".npz": NPZ,
    ".keras": KERAS,
    ".msgpack": ("a Flax checkpoint (msgpack)", CONVERT),
}
TEXT = "text", "save the rows with numpy.save"


def format_of(path: Path, head: bytes) -> str | None:
    """Return the format of a file and what to do, from its first HEAD_BYTES; None if the format is not recognised."""
    if not head.strip(b"\0"):
        return f"{'a row of zero bytes' if head else 'empty'}: download or write it again"
    found = next((named for magic, named in MAGIC.items() if head.startswith(magic)), None)
    if found is None and head.startswith(b"PK\x03\x04"):
        found = zipped(head, path)
    elif found is PYTORCH and path.suffix in (".pdparams", ".pdopt"):
        found = PADDLE
    elif found is None and path.suffix.startswith(".data-"):
        found = TENSORFLOW
    found = found or inside(head) or SUFFIXES.get(path.suffix.lower()) or (TEXT if is_text(head) else None)
    return found and f"{found[0]}: {found[1]}"


def zipped(head: bytes, path: Path) -> tuple[str, str]:
    """Return the format of a zip archive, by the name of its first member and its suffix."""
    first = head[30 : 30 + int.from_bytes(head[26:28], "little")]
    if first.endswith(b".npy"):
        return NPZ
    if first.endswith((b"data.pkl", b"/version", b"byteorder")):
        return PYTORCH
    return SUFFIXES.get(path.suffix.lower(), ("a zip archive", "unpack it"))


def inside(head: bytes) -> tuple[str, str] | None:
    """Return the format of a file whose mark is not at its beginning."""
    if head[4:8] == b"TFL3":
        return TFLITE
    if head[257:262] == b"ustar":
        return "a tar archive", "unpack it"
    # a protobuf message that begins with a small ir_version, and continues with a field of ModelProto
    is_onnx = head[:1] == b"\x08" and head[1:2] < b"\x20" and head[2:3] in (b"\x12", b"\x1a", b"\x3a", b"\x42")
    return ONNX if is_onnx else None


def is_text(head: bytes) -> bool:
    """Return True if bytes, which may end within a character, are printable UTF-8."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return all(char.isprintable() or char in "\t\r\n" for char in text)

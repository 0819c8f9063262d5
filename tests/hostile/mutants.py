"""Mutated requests: with wrong fields, as from a careless or hostile caller, or with corrupted bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

INTEGERS = (0, 1, 2, 3, 7, 63, 64, 255, -1, -2, 2**31 - 1, 2**31, -(2**31), 2**32, 2**62, 2**63 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-300, 1e300, 3.5e38, float("inf"), float("-inf"), float("nan"))
WORDS = ("", "a", "../../etc/passwd", "..", "a/b", "\0", "a\0b", "A", "\u202e", "x" * 5000, "#", "%s", "{0}")
with np.errstate(over="ignore"):
    NUMBERS = b"".join(np.array(FLOATS, dtype).tobytes() for dtype in ("<f4", "<f8")) + bytes(range(256))
Field = FieldDescriptor


def mutant(message: Message, donor: Message, rng: np.random.Generator) -> Message:
    """Return a copy in which some fields, at any depth, are changed; submessages may be copied from the donor."""
    copy = type(message)()
    copy.CopyFrom(message)
    for _ in range(int(rng.integers(1, 4))):
        change_(copy, donor, rng)
    return copy


def change_(message: Message, donor: Message, rng: np.random.Generator) -> None:
    """Change one field, or one inside a submessage."""
    fields = list(message.DESCRIPTOR.fields)
    if not fields:
        return
    present = [field for field, _ in message.ListFields()]
    field = (
        fields[rng.integers(len(fields))] if rng.random() < 0.4 or not present else present[rng.integers(len(present))]
    )
    if field.is_repeated:
        change_repeated_(getattr(message, field.name), field, donor, rng)
    elif rng.random() < 0.15:
        message.ClearField(field.name)
    elif field.type == Field.TYPE_MESSAGE:
        change_submessage_(message, field, donor, rng)
    else:
        setattr(message, field.name, value(field, getattr(message, field.name), rng))


def change_submessage_(message: Message, field: Field, donor: Message, rng: np.random.Generator) -> None:
    """Change a field inside the submessage, or replace the submessage by an empty one or one of the donor's."""
    below = getattr(message, field.name)
    if rng.random() < 0.7 and message.HasField(field.name):
        change_(below, donor, rng)
        return
    below.SetInParent()
    found = of_type(donor, field.message_type.full_name)
    if found:
        below.CopyFrom(found[rng.integers(len(found))])


def change_repeated_(values: Any, field: Field, donor: Message, rng: np.random.Generator) -> None:
    """Add, remove or change one value of a repeated field."""
    if len(values) and rng.random() < 0.3:
        del values[int(rng.integers(len(values)))]
    elif field.type == Field.TYPE_MESSAGE:
        change_(values[int(rng.integers(len(values)))] if len(values) else values.add(), donor, rng)
    elif len(values) and rng.random() < 0.6:
        place = int(rng.integers(len(values)))
        values[place] = value(field, values[place], rng)
    else:
        values.append(value(field, field.default_value or (b"" if field.type == Field.TYPE_BYTES else 0), rng))


def value(field: Field, old: Any, rng: np.random.Generator) -> Any:
    """Return another value for a scalar field."""
    kind = field.cpp_type
    if field.type == Field.TYPE_BYTES:
        return noisy(old, rng)
    if kind == Field.CPPTYPE_STRING:
        return WORDS[rng.integers(len(WORDS))]
    if kind == Field.CPPTYPE_BOOL:
        return not old
    if kind in (Field.CPPTYPE_DOUBLE, Field.CPPTYPE_FLOAT):
        return FLOATS[rng.integers(len(FLOATS))]
    if kind == Field.CPPTYPE_ENUM:
        return int(rng.integers(0, 9))
    return fitting(int(INTEGERS[rng.integers(len(INTEGERS))]) if rng.random() < 0.7 else old + 1, kind)


def fitting(number: int, kind: int) -> int:
    """Wrap a number into the range of the field's type, because others cannot be sent."""
    bits = 32 if kind in (Field.CPPTYPE_INT32, Field.CPPTYPE_UINT32) else 64
    if kind in (Field.CPPTYPE_UINT32, Field.CPPTYPE_UINT64):
        return number % 2**bits
    return (number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1)


def noisy(old: bytes, rng: np.random.Generator) -> bytes:
    """Insert extreme or non-finite numbers into a tensor's bytes, or return too few or too many bytes."""
    if not old or rng.random() < 0.3:
        return old[: int(rng.integers(len(old) + 1))] + NUMBERS[: int(rng.integers(16))]
    start = int(rng.integers(len(old)))
    noise = NUMBERS[int(rng.integers(len(NUMBERS))) :][: int(rng.integers(1, 9))]
    return (old[:start] + noise + old[start + len(noise) :])[: len(old)]


def of_type(message: Message, name: str) -> list[Message]:
    """Return the message itself and all its submessages that have the given type."""
    found = [message] if message.DESCRIPTOR.full_name == name else []
    for field, content in message.ListFields():
        if field.type == Field.TYPE_MESSAGE:
            for each in content if field.is_repeated else (content,):
                found += of_type(each, name)
    return found


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """Corrupt bytes in one of several ways: random, truncated, inserted, overwritten, repeated or flipped."""
    place, noise = int(rng.integers(len(content) + 1)), rng.bytes(int(rng.integers(1, 12)))
    before, after = content[:place], content[place:]
    flipped = bytearray(content or b"\0")
    for bit in rng.integers(8 * len(flipped), size=int(rng.integers(1, 9))):
        flipped[bit // 8] ^= 1 << (bit % 8)
    ways = [
        rng.bytes(int(rng.integers(0, 300))),
        before,
        after,
        before + noise + after,
        before + noise + after[len(noise) :],
        before + b"\xff" * 10 + after,
        content + after,
        bytes(flipped),
    ]
    return ways[rng.integers(len(ways))]

from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class LogitTransform(_message.Message):
    __slots__ = ("scale", "soft_cap", "normalize")
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SOFT_CAP_FIELD_NUMBER: _ClassVar[int]
    NORMALIZE_FIELD_NUMBER: _ClassVar[int]
    scale: float
    soft_cap: float
    normalize: bool
    def __init__(self, scale: _Optional[float] = ..., soft_cap: _Optional[float] = ..., normalize: bool = ...) -> None: ...

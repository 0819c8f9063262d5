from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class CallCost(_message.Message):
    __slots__ = ("total_us", "wait_us", "plan_us", "fanout_us", "kernel_us", "finish_us", "received_bytes", "sent_bytes", "flops")
    TOTAL_US_FIELD_NUMBER: _ClassVar[int]
    WAIT_US_FIELD_NUMBER: _ClassVar[int]
    PLAN_US_FIELD_NUMBER: _ClassVar[int]
    FANOUT_US_FIELD_NUMBER: _ClassVar[int]
    KERNEL_US_FIELD_NUMBER: _ClassVar[int]
    FINISH_US_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FLOPS_FIELD_NUMBER: _ClassVar[int]
    total_us: int
    wait_us: int
    plan_us: int
    fanout_us: int
    kernel_us: int
    finish_us: int
    received_bytes: int
    sent_bytes: int
    flops: int
    def __init__(self, total_us: _Optional[int] = ..., wait_us: _Optional[int] = ..., plan_us: _Optional[int] = ..., fanout_us: _Optional[int] = ..., kernel_us: _Optional[int] = ..., finish_us: _Optional[int] = ..., received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., flops: _Optional[int] = ...) -> None: ...

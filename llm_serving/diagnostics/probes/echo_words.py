"""The words between a probe and its peer; control frames as in `protocol`, a closed union.

Probe -> peer                              peer -> probe
    Echo        these bytes, back              Echo, EchoTensor  as they came
    EchoTensor  this array, back               Seen              taken in, and when
    Share       arrays lie in these segments
    Take, TakeNumbers, TakeTensor              (one way: answered by Seen)
    EchoRaw     connect there, and echo without frames until it is closed
"""

from __future__ import annotations

import msgspec

from llm_serving.transport.arena import TensorRef

__all__ = [
    "ANSWERS",
    "REQUESTS",
    "Answer",
    "Echo",
    "EchoRaw",
    "EchoTensor",
    "Request",
    "Seen",
    "Share",
    "Take",
    "TakeNumbers",
    "TakeTensor",
]


class Echo(msgspec.Struct, tag=True, frozen=True):
    data: bytes


class EchoTensor(msgspec.Struct, tag=True, frozen=True):
    ref: TensorRef


class Share(msgspec.Struct, tag=True, frozen=True):
    inputs: str  # the probe writes it
    results: str  # the peer writes it


class Take(msgspec.Struct, tag=True, frozen=True):
    data: bytes


class TakeNumbers(msgspec.Struct, tag=True, frozen=True):
    values: list[float]


class TakeTensor(msgspec.Struct, tag=True, frozen=True):
    ref: TensorRef


class EchoRaw(msgspec.Struct, tag=True, frozen=True):
    address: str
    num_bytes: int  # of every round


class Seen(msgspec.Struct, tag=True, frozen=True):
    received_ns: int  # the frame was there, not yet decoded
    taken_ns: int  # the array was there to compute with
    total: float  # of its first and last element: that it arrived


Request = Echo | EchoTensor | Share | Take | TakeNumbers | TakeTensor | EchoRaw
Answer = Echo | EchoTensor | Seen
REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)

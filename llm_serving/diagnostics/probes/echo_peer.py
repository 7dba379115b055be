"""The other end of a probe: a process that does what an agent does with bytes, and no more.

    python -m llm_serving.diagnostics.probes.echo_peer --rank 0 --key-fd 5 --address ...

It connects as an agent does, with the key from an inherited pipe, and ends when the channel does.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_serving.diagnostics.probes.echo_words import (
    REQUESTS,
    Answer,
    Echo,
    EchoRaw,
    EchoTensor,
    Request,
    Seen,
    Share,
    Take,
    TakeNumbers,
    TakeTensor,
)
from llm_serving.errors import AgentDied, ChannelError
from llm_serving.transport.address import new_socket, parse_address
from llm_serving.transport.arena import Arena
from llm_serving.transport.blocking import BlockingChannel
from llm_serving.transport.handshake import Hello

__all__ = ["EchoPeer", "main"]

_OneWay = Take | TakeNumbers | TakeTensor

_KEY_BYTES = 32
_RAW_TIMEOUT_S = 20.0


class EchoPeer:
    def __init__(self, channel: BlockingChannel[Answer, Request]) -> None:
        self._channel = channel
        self._memory: tuple[Arena, Arena] | None = None

    def serve(self) -> None:
        """Until the probe hangs up.  Raises AgentError if the channel lies."""
        while True:
            try:
                request = self._channel.recv()
            except AgentDied:
                return
            if isinstance(request, Share):
                self._memory = (
                    Arena.attach(request.inputs, 1, writes=False),
                    Arena.attach(request.results, 1, writes=True),
                )
            elif isinstance(request, EchoRaw):
                _echo_raw(request)
            else:
                self._channel.send(self._answer(request))

    def _answer(self, request: Echo | EchoTensor | _OneWay) -> Answer:
        if isinstance(request, Echo):
            return request
        if isinstance(request, EchoTensor):
            return self._copy_back(request)
        return _seen(self._channel.received_ns, self._array_of(request))

    def _copy_back(self, request: EchoTensor) -> EchoTensor:
        """From the inputs' segment straight into the results', as an agent's results go."""
        inputs, results = self._arenas()
        slot = results.begin()
        if slot is None:
            raise ChannelError("the probe has not read the last array")
        return EchoTensor(results.write(slot, inputs.read(request.ref)))

    def _array_of(self, request: _OneWay) -> npt.NDArray[Any]:
        """The array as computing code would take it: a view where that is possible."""
        if isinstance(request, Take):
            return np.frombuffer(request.data, np.float32)
        if isinstance(request, TakeNumbers):
            return np.array(request.values, np.float32)
        inputs, _ = self._arenas()
        return inputs.read(request.ref)

    def _arenas(self) -> tuple[Arena, Arena]:
        if self._memory is None:
            raise ChannelError("a tensor before Share")
        return self._memory


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    for name in ("rank", "key-fd", "epoch"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--address", type=parse_address, required=True)
    given = parser.parse_args(argv)
    key = os.read(given.key_fd, _KEY_BYTES)
    channel = BlockingChannel[Answer, Request].connect(
        given.address, key, Hello.of(given.rank), REQUESTS
    )
    try:
        EchoPeer(channel).serve()
    finally:
        channel.close()
    return 0


def _seen(received_ns: int, array: npt.NDArray[Any]) -> Seen:
    taken_ns = time.monotonic_ns()
    return Seen(received_ns, taken_ns, float(array.flat[0]) + float(array.flat[-1]))


def _echo_raw(request: EchoRaw) -> None:
    buffer = memoryview(bytearray(request.num_bytes))
    address = parse_address(request.address)
    with new_socket(address) as peer:
        peer.settimeout(_RAW_TIMEOUT_S)
        peer.connect(address)
        if peer.family == socket.AF_INET:
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while _fill(peer, buffer):
            peer.sendall(buffer)


def _fill(peer: socket.socket, buffer: memoryview) -> bool:
    """False if the probe has hung up."""
    num = 0
    while num < len(buffer):
        more = peer.recv_into(buffer[num:])
        if not more:
            return False
        num += more
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

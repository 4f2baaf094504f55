"""What a replica asks its own worker: whether the engine's loop comes round."""

from __future__ import annotations

import grpc
import grpc.aio

from core.errors import EngineError
from core.security.channels import Channels
from wire import session_pb2 as pb
from wire import session_pb2_grpc


class HealthClient:
    """Over one channel, on the event loop that it is made on."""

    def __init__(self, endpoint: str, channels: Channels) -> None:
        self._channel = channels.open(endpoint)
        self._stub = session_pb2_grpc.WorkerStub(self._channel)

    async def check(self, within_s: float) -> None:
        """Returns when the loop has come round, which it does between two steps. Raises EngineError."""
        try:
            await self._stub.Health(pb.HealthRequest(), timeout=within_s)
        except grpc.aio.AioRpcError as error:
            raise EngineError(f"the engine does not answer: {error.code().name}: {error.details()}") from None

    async def close(self) -> None:
        await self._channel.close(None)

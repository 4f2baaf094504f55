"""Sessions within one process, as bad as real ones: for tests and simulation.

Messages take their time; they may be lost, doubled and overtaken. A session breaks, loses what is under way, and is
dialled again; a worker dies without a word, or stops hearing. Chance comes from one seed and time from the event loop.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from random import Random

from core.errors import HandoffError
from core.messages import Peer, WorkerId
from kvtransfer.chores import Chores
from kvtransfer.messages import Message
from kvtransfer.receiver_link import HandoffReceiver
from kvtransfer.source_link import HandoffSource


@dataclass(frozen=True, slots=True)
class Weather:
    """Shares are probabilities per message; delays are seconds, drawn from nought to twice the mean."""

    delay_s: float = 0.0005
    redial_s: float = 0.05
    lose: float = 0.0
    double: float = 0.0
    overtake: float = 0.0  # takes ten times as long as the others
    cut: float = 0.0  # the session breaks


Pair = tuple[WorkerId, WorkerId]  # source, receiver
TIE_S = 1e-9  # two messages never arrive at the same time: the loop does not promise an order then


class MemoryNetwork:
    """Joins sources and receivers by their endpoints. `kill`, `cut` and `weather` are for tests."""

    def __init__(self, random: Random, weather: Weather | None = None) -> None:
        self.weather = weather or Weather()
        self._random = random
        self._sources: dict[WorkerId, HandoffSource] = {}
        self._receivers: dict[str, HandoffReceiver] = {}  # by endpoint
        self._wanted: dict[Pair, Peer] = {}  # sessions that their source has dialled and not hung up
        self._up: dict[Pair, int] = {}  # the number of each session that is up
        self._due_s: dict[tuple[bool, Pair], float] = {}  # when the last message each way arrives: they stay in order
        self._last = 0
        self._chores = Chores()

    def add_source(self, source: HandoffSource) -> MemorySessions:
        self._sources[source.me] = source
        return MemorySessions(self, source.me, dials=True)

    def add_receiver(self, endpoint: str, receiver: HandoffReceiver) -> MemorySessions:
        """The endpoint is this worker's from now on: an earlier incarnation is gone."""
        self._receivers[endpoint] = receiver
        return MemorySessions(self, receiver.me, dials=False)

    def kill(self, worker: WorkerId) -> None:
        """It dies without a word; its peers see their sessions break."""
        for pair in [pair for pair in self._up if worker in pair]:
            self.cut(*pair)
        self._sources.pop(worker, None)
        gone = [endpoint for endpoint, receiver in self._receivers.items() if receiver.me == worker]
        for endpoint in gone:
            del self._receivers[endpoint]

    def cut(self, source: WorkerId, receiver: WorkerId) -> None:
        """The session breaks, and what is under way is lost. The source dials again."""
        pair = (source, receiver)
        if self._up.pop(pair, None) is None:
            return
        at_source, at_receiver = self._sources.get(source), self._receiver(receiver)
        if at_source is not None:
            at_source.session_down(receiver)
        if at_receiver is not None:
            at_receiver.session_down(source)
        self._later(self.weather.redial_s, pair)

    # --- what sessions do ------------------------------------------------------------------------------------

    def dial(self, source: WorkerId, peer: Peer) -> None:
        pair = (source, peer.worker)
        if pair not in self._wanted:
            self._wanted[pair] = peer
            self._later(self._delay_s(), pair)

    def hang_up(self, pair: Pair) -> None:
        self._wanted.pop(pair, None)
        self.cut(*pair)

    def send(self, sender: WorkerId, pair: Pair, message: Message) -> None:
        number = self._up.get(pair)
        if number is None or self._chance(self.weather.lose):
            return
        if self._chance(self.weather.cut):
            self.cut(*pair)
            return
        loop = asyncio.get_running_loop()
        for _ in range(2 if self._chance(self.weather.double) else 1):
            direction = (sender == pair[0], pair)
            due_s = max(loop.time() + self._delay_s(), self._due_s.get(direction, 0.0) + TIE_S)
            if self._chance(self.weather.overtake):
                due_s += 10 * self._delay_s()
            else:
                self._due_s[direction] = due_s
            loop.call_at(due_s, self._arrive, pair, number, sender, message)

    # --- inside ----------------------------------------------------------------------------------------------

    def _arrive(self, pair: Pair, number: int, sender: WorkerId, message: Message) -> None:
        if self._up.get(pair) != number:
            return  # it was under way when its session broke
        source, receiver = self._sources.get(pair[0]), self._receiver(pair[1])
        if sender == pair[0] and receiver is not None:
            receiver.receive(sender, message)  # type: ignore[arg-type]
        elif sender == pair[1] and source is not None:
            source.receive(sender, message)  # type: ignore[arg-type]

    def _open(self, pair: Pair) -> None:
        peer, source = self._wanted.get(pair), self._sources.get(pair[0])
        if peer is None or source is None or pair in self._up:
            return
        receiver = self._receivers.get(peer.endpoint)
        if receiver is None:
            self._later(self.weather.redial_s, pair)
            return
        self._chores.spawn(self._greet(peer, source, receiver), f"session {pair}")

    async def _greet(self, peer: Peer, source: HandoffSource, receiver: HandoffReceiver) -> None:
        """Open, each way."""
        pair = (source.me, peer.worker)
        try:
            await source.answered(await receiver.greet(await source.opening(peer.worker)))
        except HandoffError as error:
            self._wanted.pop(pair, None)
            source.peer_gone(peer.worker, error)
            return
        except ConnectionError:  # one end died while it was greeted
            self._later(self.weather.redial_s, pair)
            return
        alive = self._sources.get(source.me) is source and self._receivers.get(peer.endpoint) is receiver
        if alive and pair in self._wanted and pair not in self._up:
            self._last += 1
            self._up[pair] = self._last
            receiver.session_up(pair[0])
            source.session_up(pair[1])

    def _receiver(self, worker: WorkerId) -> HandoffReceiver | None:
        found = [receiver for receiver in self._receivers.values() if receiver.me == worker]
        return found[0] if found else None

    def _later(self, pause_s: float, pair: Pair) -> None:
        asyncio.get_running_loop().call_later(pause_s, self._open, pair)

    def _delay_s(self) -> float:
        return self._random.uniform(0.0, 2.0) * self.weather.delay_s

    def _chance(self, share: float) -> bool:
        return share > 0.0 and self._random.random() < share


class MemorySessions:
    """One worker's sessions: a Dialer for its source, or the Sessions of its receiver."""

    def __init__(self, network: MemoryNetwork, me: WorkerId, *, dials: bool) -> None:
        self._network = network
        self._me = me
        self._dials = dials

    def dial(self, peer: Peer) -> None:
        assert self._dials, "a receiver is dialled"
        self._network.dial(self._me, peer)

    def send(self, worker: WorkerId, message: Message) -> None:
        self._network.send(self._me, self._pair(worker), message)

    def hang_up(self, worker: WorkerId) -> None:
        self._network.hang_up(self._pair(worker))

    def _pair(self, worker: WorkerId) -> Pair:
        return (self._me, worker) if self._dials else (worker, self._me)

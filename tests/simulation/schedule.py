"""One schedule from one seed: requests and faults on a cluster of two routers and six workers, and what must hold.

I1 every request ends once     I2 no wrong token, no index repeated or missing     I3 nothing is leaked
I4 it ends in time             I5 no tenant is given another's pages           I6 a request costs two workers at most
I7 retries stay within a fifth of the load, beyond the few that are always allowed
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from core.errors import BatonError
from core.hashing import root_hash
from core.messages import Receipt
from core.sampling import SamplingParams
from engine.hashchain import reference_tokens
from kvtransfer.memory import Mischief
from router.choose import Terms
from router.generation import GenerationRequest, Step
from router.retries import RetryBudget
from tests.simulation.cluster import POISON, VOCABULARY, SimCluster
from tests.simulation.faults import FAULTS
from tests.simulation.router import SimRouter
from tests.simulation.virtual_time import run

CLEAR = frozenset({"no_capacity", "deadline_exceeded", "poison_request"})  # what a client may be told
QUIET_S = 60.0  # by then nothing is held any more
LATE_S = 0.5  # past a deadline
TENANTS = (b"a", b"b")
STEPS_ALONE_S = (0.002, 0.02)  # of the engine, where a seed does not draw the faults
STEPS_S = (0.002, 0.002, 0.002, 0.02, 0.02, 0.2)
LEAST_MESSAGES = 300  # of a schedule
EAGER = Terms(local_prefill_tokens=32, lend_tokens=16, loan_s=0.0)  # history is borrowed wherever it can be
LOOK_S = 0.5  # how often the books are read while it runs


@dataclass
class Outcome:
    """Of one schedule. `violations` name the invariant first."""

    seed: int
    faults: list[str] = field(default_factory=list)
    right: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    left: int = 0  # clients that went away, or lost their router
    retries: int = 0
    messages: int = 0
    virtual_s: float = 0.0
    silence_s: float = 0.0  # the longest that a client of the fault waited for its next token or its end
    violations: list[str] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return self.right + sum(self.errors.values()) + self.left


class Client:
    """One request, and everything that its client was given."""

    def __init__(self, request: GenerationRequest, outcome: Outcome) -> None:
        self.request = request
        self.ends: list[str] = []
        self.gaps: list[tuple[float, float]] = []  # when it ended, how long it was
        self._outcome = outcome
        self._tokens: list[list[int]] = [[] for _ in range(request.params.n)]
        self._finished: set[int] = set()
        self.receipts: list[Receipt] = []
        self._now_s = asyncio.get_running_loop().time
        self._heard_s = self.began_s = self._now_s()

    async def run(self, router: SimRouter) -> None:
        router.counts.offered += 1
        try:
            async with aclosing(router.saga.generate(self.request)) as stream:  # type: ignore[type-var]
                async for step in stream:
                    self._take(step)
        except BatonError as error:
            self._end(error.code)
        except asyncio.CancelledError:
            self._end("left")
        except Exception as error:  # noqa: BLE001  (whatever it is, it is no clear error)
            self._end(f"{type(error).__name__}: {error}")
        else:
            self._end("right")
        if self.ends == ["right"]:
            self._check_whole()

    def _take(self, step: Step) -> None:
        self._hear()
        if self.ends:
            self._violated("I1", "a token after the end")
        if step.receipt is not None:
            self.receipts.append(step.receipt)
        for token in step.tokens:
            ids = self._tokens[token.choice]
            if token.index != len(ids) or token.choice in self._finished:
                self._violated("I2", f"index {token.index} of choice {token.choice} after {len(ids)} tokens")
            elif token.token_id != self.wanted[token.choice][token.index]:
                self._violated("I2", f"token {token.index} of choice {token.choice} is {token.token_id}")
            ids.append(token.token_id)
            if token.finish is not None:
                self._finished.add(token.choice)

    @property
    def wanted(self) -> list[list[int]]:
        """What a fault-free run gives, computed when it is needed."""
        if not hasattr(self, "_wanted"):
            params, prompt = self.request.params, self.request.prompt_ids
            assert params.seed is not None
            self._wanted = [reference_tokens(prompt, params, params.seed, c, VOCABULARY) for c in range(params.n)]
        return self._wanted

    def _check_whole(self) -> None:
        lengths = [len(ids) for ids in self._tokens]
        if lengths != [len(ids) for ids in self.wanted] or len(self._finished) != len(lengths):
            self._violated("I2", f"it ended well after {lengths} tokens")
        sums = {receipt.prompt_tokens for receipt in self.receipts}  # one from each attempt that has spoken
        if sums != {len(self.request.prompt_ids)}:
            self._violated("I2", f"receipts {self.receipts}")

    def _hear(self) -> None:
        now_s = self._now_s()
        self.gaps.append((now_s, now_s - self._heard_s))
        self._heard_s = now_s

    def _end(self, how: str) -> None:
        self._hear()
        self.ends.append(how)
        late_s = self._heard_s - self.began_s - self.request.deadline_s
        if late_s > LATE_S:
            self._violated("I4", f"it ended {late_s:.1f} s past its deadline")
        if how not in CLEAR | {"right", "left"}:
            self._violated("I1", f"no clear error: {how}")

    def _violated(self, name: str, text: str) -> None:
        self._outcome.violations.append(f"{name}: {self.request.request_id}: {text}")

    def count(self) -> None:
        if len(self.ends) != 1:
            self._violated("I1", f"ends {self.ends}")
        for how in self.ends:
            if how == "right":
                self._outcome.right += 1
            elif how == "left":
                self._outcome.left += 1
            else:
                self._outcome.errors[how] = self._outcome.errors.get(how, 0) + 1


class Schedule:
    """Draws what happens, lets it happen, and judges it."""

    def __init__(self, seed: int, kinds: Sequence[str] | None = None) -> None:
        self.rng = Random(seed)
        self.outcome = Outcome(seed)
        self._kinds = kinds
        self._clients: list[Client] = []
        self._struck_s: list[float] = []
        self._roots = {root_hash("hash-chain", salt=salt) for salt in (b"", *TENANTS)}

    async def run(self) -> Outcome:
        rng, loop = self.rng, asyncio.get_running_loop()
        alone = self._kinds is not None
        self.cluster = cluster = SimCluster(
            rng.randrange(2**32),
            routers=2,
            prefill=3,
            decode=3,
            pages=120 if alone else rng.choice([48, 120]),
            mischief=Mischief(),
            two_sided=rng.random() < 0.5,
            step_s=rng.choice(STEPS_ALONE_S if alone else STEPS_S),
            terms=rng.choice([Terms(local_prefill_tokens=32), EAGER]),
        )
        await cluster.start()
        if not alone and rng.random() < 0.3:
            for router in cluster.routers:
                router.saga._budget = RetryBudget(level=2.0)
        began_s = loop.time()
        looking = cluster.spawn(self._look())
        requests = [asyncio.create_task(self._arrive(n)) for n in range(rng.randrange(7, 11))]
        kinds = self._kinds if self._kinds is not None else self._draw()
        await asyncio.gather(*[self._strike(kind) for kind in kinds], *requests)
        while cluster.messages < LEAST_MESSAGES:
            await self._arrive(len(self._clients) + 100)
        looking.cancel()
        cluster.fabric.mischief = Mischief()
        await self._settle()
        self._judge()
        self.outcome.messages = cluster.messages
        self.outcome.virtual_s = loop.time() - began_s
        await self._close()
        return self.outcome

    # --- requests ----------------------------------------------------------------------------------------------

    async def _arrive(self, number: int) -> None:
        rng = self.rng
        request = self._request(number)
        await asyncio.sleep(rng.uniform(0.0, 0.8))
        client = await self._serve(request, rng.randrange(2))
        if client.ends == ["right"] and rng.random() < 0.4:
            await self._serve(self._second_turn(client), rng.randrange(2))

    async def _serve(self, request: GenerationRequest, index: int) -> Client:
        while (router := self.cluster.routers[index]).dead:
            index = 1 - index
            if self.cluster.routers[index].dead:
                await asyncio.sleep(0.1)  # both are dead: the client tries again
        client = Client(request, self.outcome)
        self._clients.append(client)
        task = asyncio.create_task(client.run(router), name=request.request_id)
        router.clients.add(task)
        await asyncio.wait([task])
        router.clients.discard(task)
        if task.cancelled():  # before its first step
            client.ends.append("left")
        return client

    def _second_turn(self, first: Client) -> GenerationRequest:
        """The conversation goes on: a decode worker has its history."""
        more = [self.rng.randrange(POISON) for _ in range(self.rng.choice([3, 20]))]
        prompt = (*first.request.prompt_ids, *first.wanted[0], *more)
        return replace(first.request, request_id=f"{first.request.request_id}b", prompt_ids=prompt)

    def _request(self, number: int) -> GenerationRequest:
        rng = self.rng
        family = Random(rng.randrange(2))  # prompts of two families share what comes first, whoever's they are
        shared = [family.randrange(POISON) for _ in range(160)]
        tail = [rng.randrange(POISON) for _ in range(rng.choice([1, 5, 16, 40, 100]))]
        prompt = shared[: rng.choice([0, 0, 16, 64, 100, 160])] + tail
        params = SamplingParams(
            max_tokens=rng.randrange(1, 40),
            n=rng.choice([1, 1, 1, 2]),
            temperature=rng.choice([0.0, 1.0]),
            seed=rng.randrange(1000),
        )
        deadline_s = rng.choice([60.0, 60.0, rng.uniform(2.0, 30.0)]) if self._kinds is None else 60.0
        return GenerationRequest(f"r{number}", tuple(prompt), params, deadline_s, salt=rng.choice(TENANTS))

    # --- faults ------------------------------------------------------------------------------------------------

    def _draw(self) -> list[str]:
        rng = self.rng
        return [rng.choice([*FAULTS, "poison"]) for _ in range(rng.choice([2, 2, 3, 3, 4, 6]))]

    async def _strike(self, kind: str) -> None:
        """At a random moment, or when a random number of messages has been sent."""
        rng, cluster = self.rng, self.cluster
        await self._moment()
        self._struck_s.append(asyncio.get_running_loop().time())
        struck: Awaitable[bool] = self._poison() if kind == "poison" else FAULTS[kind].strike(cluster, rng)
        if await struck:
            self.outcome.faults.append(kind)

    async def _moment(self) -> None:
        if self.rng.random() < 0.5:
            await asyncio.sleep(self.rng.uniform(0.0, 1.2))
            return
        await self.cluster.more_messages(self.rng.randrange(1, 600))

    async def _poison(self) -> bool:
        """A request that kills whoever computes it."""
        if any(client.request.request_id == "poison" for client in self._clients):
            return False
        prompt = (POISON, *[self.rng.randrange(POISON) for _ in range(self.rng.choice([10, 120]))])
        params = SamplingParams(max_tokens=5, temperature=0.0, seed=0)
        await self._serve(GenerationRequest("poison", prompt, params, 60.0), self.rng.randrange(2))
        return True

    # --- what must hold ----------------------------------------------------------------------------------------

    async def _look(self) -> None:
        """The books, while it runs."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self.cluster.check(busy_only=True)
            except AssertionError as error:
                self._violated("I3", f"the books of a pool: {error}")
                return
            self._check_tenants()

    def _check_tenants(self) -> None:
        """Every named page under a running sequence has the name that its own tenant's prompt gives it."""
        for worker in self.cluster.alive.values():
            pool = worker.worker.pool
            for sequence in worker.worker.engine.sequences if not worker.dead else ():
                names = sequence.full_hashes(worker.worker.engine.page_size)
                held = [pool._hashes[page] for page in sequence.pages]
                if any(name is not None and name != own for name, own in zip(held, names, strict=False)):
                    self._violated("I5", f"{sequence.request_id} holds a page of another prompt")
                if sequence.root not in self._roots:
                    self._violated("I5", f"{sequence.request_id} has lost its tenant")

    async def _settle(self) -> None:
        began_s = asyncio.get_running_loop().time()
        left = await self.cluster.quiesce(QUIET_S)
        for leak in left:
            self._violated("I3", f"after {asyncio.get_running_loop().time() - began_s:.0f} s: {leak}")

    def _judge(self) -> None:
        self.outcome.violations += self.cluster.violations
        for client in self._clients:
            client.count()
            self._check_cached(client)
        for router in self.cluster.all_routers:
            counts = router.counts
            self.outcome.retries += counts.retries
            if counts.retries > 10 + 0.2 * counts.offered:
                self._violated("I7", f"{router.name}: {counts.retries} retries of {counts.offered} requests")
        if len(self.cluster.poisoned) > 2:
            self._violated("I6", f"one request has killed {self.cluster.poisoned}")
        first_s = min(self._struck_s, default=0.0)
        gaps = [length_s for client in self._clients for ended_s, length_s in client.gaps if ended_s >= first_s]
        self.outcome.silence_s = max(gaps, default=0.0)

    def _check_cached(self, client: Client) -> None:
        """What was found cached for a first attempt is a prefix of something else of its own tenant."""
        request = client.request
        attempts = max(router.attempts.get(request.request_id, 0) for router in self.cluster.all_routers)
        if attempts > 1 or request.request_id == "poison":
            return
        others = [c for c in self._clients if c is not client and c.request.salt == request.salt]
        longest = max((_common(request.prompt_ids, c) for c in others), default=0)
        for receipt in client.receipts:
            cached = receipt.cached_prefill_tokens + receipt.cached_decode_tokens + receipt.fetched_tokens
            if cached > longest:
                self._violated("I5", f"{request.request_id}: {cached} tokens were cached, its tenant has {longest}")

    async def _close(self) -> None:
        await self.cluster.close()
        await asyncio.sleep(0.001)  # what was cancelled last ends
        left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in left:
            self._violated("I3", f"a task is left: {task.get_name()}")

    def _violated(self, name: str, text: str) -> None:
        self.outcome.violations.append(f"{name}: {text}")


def _common(prompt: Sequence[int], other: Client) -> int:
    """Tokens that a prompt and another request's ids begin with."""
    found = 0
    for one, two in zip(prompt, other.request.prompt_ids, strict=False):
        if one != two:
            return found
        found += 1
    if found == len(other.request.prompt_ids):
        rest = [_prefix(prompt[found:], ids) for ids in other.wanted]
        return found + max(rest)
    return found


def _prefix(one: Sequence[int], two: Sequence[int]) -> int:
    pairs: Any = zip(one, two, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))


def play(seed: int, kinds: Sequence[str] | None = None) -> Outcome:
    """Under virtual time. `kinds`: these faults, once each, instead of what the seed draws."""

    async def main() -> Outcome:
        return await Schedule(seed, kinds).run()

    return run(main())

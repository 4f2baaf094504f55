"""Without the router's ticket nothing is served, and nothing is held; honest requests go on beside it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from core.errors import BadTicket
from core.messages import Cancel, Lend, Peer, RequestFailed, Submit, WorkerId
from core.sampling import SamplingParams
from core.security.tickets import Tickets
from router.permits import Permits
from tests.simulation.cluster import SimCluster, SimWorker, request_of
from tests.simulation.test_calm import prompt_of, tokens_of, wanted
from tests.simulation.virtual_time import run

PARAMS = SamplingParams(max_tokens=8, temperature=0.0, seed=7)
STRANGER = Peer(WorkerId("decode-9", 1), "10.6.6.6:1")


async def withheld(cluster: SimCluster, worker: SimWorker, prompt: list[int]) -> Submit:
    """A Submit that the router meant for this worker, and that has not reached it; the request is given up."""
    caught: asyncio.Queue[Submit] = asyncio.Queue()
    desk = worker.desk
    deliver, desk.submit = desk.submit, lambda router, submit: caught.put_nowait(submit)  # type: ignore[method-assign]
    asking = asyncio.ensure_future(cluster.generate(request_of("r", prompt, PARAMS)))
    submit = await caught.get()
    asking.cancel()
    await asyncio.wait([asking])
    desk.submit = deliver  # type: ignore[method-assign]
    assert await cluster.quiesce() == []
    return submit


async def told_by(worker: SimWorker, submit: Submit) -> RequestFailed:
    """What somebody who has found the port hears of a Submit."""
    queue = worker.desk.open("thief", {})
    worker.desk.submit("thief", submit)
    answer = await asyncio.wait_for(queue.messages.get(), 1.0)
    worker.desk.close("thief", queue)
    assert isinstance(answer, RequestFailed)
    return answer


def refused(worker: SimWorker) -> float:
    return sum(
        float(line.split()[-1])
        for line in worker.worker.metrics_text().decode().splitlines()
        if line.startswith("baton:tickets_refused_total")
    )


FORGERIES: dict[str, tuple[Callable[[Submit], Submit], str]] = {
    "no ticket": (lambda s: replace(s, ticket=b""), "no ticket"),
    "a changed ticket": (lambda s: replace(s, ticket=s.ticket[:-1] + bytes([s.ticket[-1] ^ 1])), "none of our keys"),
    "another attempt": (lambda s: replace(s, attempt=9), "attempt: 9 here"),
    "another request": (lambda s: replace(s, request_id="mine"), "request_id: mine here"),
    "another prompt": (lambda s: replace(s, prompt_ids=(1, *s.prompt_ids[1:])), "prefix: "),
    "another tenant's salt": (lambda s: replace(s, salt=b"theirs"), "prefix: "),
    "another peer": (lambda s: replace(s, peer=STRANGER), "10.6.6.6"),
    "a lender of its own": (lambda s: replace(s, lender=STRANGER, lent_tokens=16), "no ticket"),
    "a longer life": (lambda s: replace(s, deadline_s=1e6), "lifetime_s: "),
}


@pytest.mark.parametrize("forgery", FORGERIES)
@pytest.mark.parametrize("name", ["prefill-0", "decode-0", "worker-0"])
def test_a_forged_submit_holds_nothing_and_is_counted(name: str, forgery: str) -> None:
    async def main() -> None:
        alone = name == "worker-0"
        cluster = SimCluster(1, prefill=int(not alone), decode=int(not alone), aggregated=int(alone))
        await cluster.start()
        worker, prompt = cluster.alive[name], prompt_of(Random(1), 100)
        honest = await withheld(cluster, worker, prompt)
        before, (forge, why) = worker.worker.pool.counts(), FORGERIES[forgery]
        answer = await told_by(worker, forge(honest))
        assert (answer.code, why in answer.message) == ("bad_ticket", True), answer
        assert worker.worker.pool.counts() == before and worker.leaks() == [] and refused(worker) == 1
        worker.desk._outlet.forget((honest.request_id, honest.attempt))
        worker.desk.submit("thief", honest)
        assert refused(worker) == 1, "the ticket was good, and the forgery has not spent it"
        worker.desk.cancel(Cancel(honest.request_id, honest.attempt))
        assert (await told_by(worker, honest)).message.endswith("has been used before")
        again = request_of("again", prompt, PARAMS)
        assert tokens_of(await cluster.generate(again)) == wanted(prompt, PARAMS)
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())


def test_a_loan_without_a_ticket_is_not_given() -> None:
    async def main() -> None:
        cluster = SimCluster(1, prefill=1, decode=1)
        await cluster.start()
        lender, borrower = cluster.alive["decode-0"], cluster.alive["prefill-0"]
        prompt = prompt_of(Random(1), 96)
        await cluster.generate(request_of("r", prompt, PARAMS))
        assert await cluster.quiesce() == []
        before = lender.worker.pool.counts()
        for to in (Peer(borrower.id, borrower.id.name), STRANGER):
            lender.desk.lend(Lend("r", 1, tuple(prompt), to, 30.0))
        assert lender.worker.pool.counts() == before and lender.leaks() == [] and refused(lender) == 2
        await cluster.close()

    run(main())


def test_a_router_with_another_key_is_told_and_takes_nothing() -> None:
    async def main() -> None:
        cluster = SimCluster(1)
        await cluster.start()
        cluster.routers[0].saga._permits = Permits(Tickets([b"another key".ljust(32)]))
        for length in (10, 200):
            with pytest.raises(BadTicket):
                await cluster.generate(request_of(f"r{length}", prompt_of(Random(1), length), PARAMS))
        assert await cluster.quiesce() == []
        assert sum(map(refused, cluster.alive.values())) > 0
        await cluster.close()

    run(main())


def test_a_source_that_shows_anothers_ticket_costs_an_attempt_and_is_counted() -> None:
    """One of two prefill workers asks with the ticket of some other hand-off: the router goes on with the other."""

    async def main() -> None:
        cluster = SimCluster(1, prefill=2, decode=1)
        await cluster.start()
        bad = cluster.alive["prefill-0"]
        assert bad.worker.source is not None
        offer = bad.worker.source.offer

        async def forged(*asked: Any) -> Any:
            return await offer(*asked[:-1], b"another's")

        bad.worker.source.offer = forged  # type: ignore[method-assign]
        for n in range(4):
            prompt = prompt_of(Random(n), 100)
            assert tokens_of(await cluster.generate(request_of(f"r{n}", prompt, PARAMS))) == wanted(prompt, PARAMS)
        text = cluster.alive["decode-0"].worker.metrics_text().decode()
        faults = [line for line in text.splitlines() if 'peer="prefill-0"' in line and "bad_ticket" in line]
        assert faults and float(faults[0].split()[-1]) > 0, "it is counted by its peer"
        assert await cluster.quiesce() == []
        await cluster.close()

    run(main())

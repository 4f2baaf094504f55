"""Tickets: one changed bit or field is refused, by name; a worker lets each in once; keys can be changed."""

from __future__ import annotations

import asyncio
from dataclasses import fields, replace
from random import Random

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kvtransfer_pair import memory_pair, prompt_of
from simulation.virtual_time import run as run_virtual

from core.errors import BadTicket, ConfigError
from core.messages import Lend, Peer, Role, Submit, WorkerId, WorkerInfo
from core.sampling import SamplingParams
from core.security.gate import Gate
from core.security.keys import digest_key, read_keys
from core.security.tickets import MAX_BYTES, Claims, Purpose, Tickets, prefix_hash
from kvtransfer.messages import HandoffKey
from kvtransfer.ports import NoCounters

KEY, OTHER_KEY = b"k" * 32, b"o" * 32
TICKETS = Tickets([KEY])
P = Peer(WorkerId("prefill-0", 2**63 - 1), "unix:/run/p")
D = Peer(WorkerId("decode-0", 7), "10.0.0.2:9000")
IDS, SALT = (1, 2, 2**32 - 1), b"tenant"
CLAIMS = Claims(Purpose.HANDOFF, "f" * 32, 3, P, D, prefix_hash(IDS, SALT), len(IDS), 30.0)

texts = st.text(max_size=40)
peers = st.builds(Peer, st.builds(WorkerId, texts, st.integers(0, 2**64 - 1)), texts)
claims = st.builds(
    Claims,
    purpose=st.sampled_from(Purpose),
    request_id=texts,
    attempt=st.integers(0, 2**32 - 1),
    source=st.none() | peers,
    receiver=peers,
    prefix=st.binary(min_size=32, max_size=32),
    tokens=st.integers(0, 2**32 - 1),
    lifetime_s=st.floats(0, 1000),
    tenant=texts,
)


class TestTickets:
    @settings(deadline=None)
    @given(claims)
    def test_a_ticket_says_what_was_signed(self, said: Claims) -> None:
        read = TICKETS.check(TICKETS.sign(said), said)
        assert replace(read, lifetime_s=said.lifetime_s) == said
        assert 0 < read.lifetime_s - said.lifetime_s < 0.0011

    @settings(deadline=None)
    @given(claims, st.data())
    def test_any_changed_bit_is_refused(self, said: Claims, data: st.DataObject) -> None:
        ticket = bytearray(TICKETS.sign(said))
        bit = data.draw(st.integers(0, 8 * len(ticket) - 1))
        ticket[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadTicket, match="none of our keys"):
            TICKETS.open(bytes(ticket))

    @settings(deadline=None)
    @given(claims, st.data())
    def test_any_changed_length_is_refused(self, said: Claims, data: st.DataObject) -> None:
        ticket = TICKETS.sign(said)
        cut = data.draw(st.integers(0, len(ticket) - 1))
        for changed in (ticket[:cut], ticket[cut:] if cut else ticket + b"\0", ticket + ticket):
            with pytest.raises(BadTicket):
                TICKETS.open(changed)

    @settings(deadline=None)
    @given(claims, claims, st.sampled_from([field.name for field in fields(Claims)]))
    def test_any_field_that_is_not_ours_is_refused_by_its_name(self, said: Claims, other: Claims, name: str) -> None:
        changed = replace(said, **{name: getattr(other, name)})
        ticket = TICKETS.sign(changed)
        longer = name == "lifetime_s" and changed.lifetime_s > said.lifetime_s
        assume(longer or not 0 < said.lifetime_s - changed.lifetime_s < 0.0011)  # it is rounded up
        if name == "tenant" or changed == said or longer:
            TICKETS.check(ticket, said)
        else:
            with pytest.raises(BadTicket, match=f"{name}: "):
                TICKETS.check(ticket, said)

    def test_fields_cannot_run_into_each_other(self) -> None:
        one, two = replace(CLAIMS, tenant="ab", request_id="c"), replace(CLAIMS, tenant="a", request_id="bc")
        assert TICKETS.sign(one) != TICKETS.sign(two)
        assert prefix_hash(IDS, b"") != prefix_hash(IDS, SALT) != prefix_hash(IDS[:2], SALT)

    def test_it_is_used_no_longer_than_it_lives(self) -> None:
        ticket = TICKETS.sign(CLAIMS)
        for lifetime_s in (0.0, 29.9, 30.0):
            TICKETS.check(ticket, replace(CLAIMS, lifetime_s=lifetime_s))
        for lifetime_s in (30.002, float("inf"), float("nan")):
            with pytest.raises(BadTicket, match="lifetime_s"):
                TICKETS.check(ticket, replace(CLAIMS, lifetime_s=lifetime_s))

    def test_without_the_key_nothing_is_accepted(self) -> None:
        stranger = Tickets([OTHER_KEY])
        with pytest.raises(BadTicket, match="none of our keys"):
            TICKETS.check(stranger.sign(CLAIMS), CLAIMS)
        with pytest.raises(BadTicket, match="no ticket"):
            TICKETS.check(b"", CLAIMS)

    def test_a_key_is_changed_without_a_break(self) -> None:
        both = Tickets([OTHER_KEY, KEY])
        both.check(TICKETS.sign(CLAIMS), CLAIMS)  # the old key is still accepted
        Tickets([OTHER_KEY]).check(both.sign(CLAIMS), CLAIMS)  # and the new one signs
        with pytest.raises(BadTicket):
            TICKETS.open(both.sign(CLAIMS))

    @pytest.mark.parametrize(
        "wrong",
        [
            {"tenant": "x" * 256},
            {"receiver": Peer(D.worker, "x" * 256)},
            {"attempt": -1},
            {"attempt": 2**32},
            {"lifetime_s": float("inf")},
            {"lifetime_s": float("nan")},
            {"prefix": b"short"},
        ],
    )
    def test_what_no_ticket_can_hold_is_not_signed(self, wrong: dict[str, object]) -> None:
        with pytest.raises(BadTicket, match="no ticket can say this"):
            TICKETS.sign(replace(CLAIMS, **wrong))  # type: ignore[arg-type]

    def test_the_longest_ticket_is_within_the_bound(self) -> None:
        longest = Peer(WorkerId("n" * 255, 2**64 - 1), "e" * 255)
        said = replace(CLAIMS, tenant="t" * 255, request_id="r" * 255, source=longest, receiver=longest)
        assert len(TICKETS.sign(said)) <= MAX_BYTES
        TICKETS.check(TICKETS.sign(said), said)


class TestKeys:
    def test_one_key_or_two(self) -> None:
        assert read_keys("6b" * 32 + "\n", "file") == (KEY,)
        assert read_keys(f"\n{'6f' * 32}\n {'6B' * 32} \n", "file") == (OTHER_KEY, KEY)

    @pytest.mark.parametrize("text", ["", "\n", "6b" * 31, "6b" * 65, "xy" * 32, ("6b" * 32 + "\n") * 3])
    def test_what_is_no_key_is_refused_and_never_shown(self, text: str) -> None:
        with pytest.raises(ConfigError, match=r"^file: ") as caught:
            read_keys(text, "file")
        assert "6b6b" not in caught.value.message and "xyxy" not in caught.value.message

    def test_the_key_of_digests_is_another(self) -> None:
        assert len(digest_key(KEY)) == 32
        assert len({KEY, digest_key(KEY), digest_key(OTHER_KEY)}) == 3


def info(peer: Peer, role: Role) -> WorkerInfo:
    return WorkerInfo(peer.worker, role, "model", "layout", 16, 100, 4096, peer.endpoint)


def submit(peer: Peer | None, ticket: bytes, deadline_s: float = 30.0) -> Submit:
    return Submit(
        CLAIMS.request_id, CLAIMS.attempt, IDS, SamplingParams(), 1, deadline_s, peer, salt=SALT, ticket=ticket
    )


class Faults(NoCounters):
    def __init__(self) -> None:
        self.faults: list[tuple[WorkerId, str]] = []

    def fault(self, peer: WorkerId, code: str) -> None:
        self.faults.append((peer, code))


class TestHandoff:
    """The receiver grants nothing to a source that does not show the ticket of the receiver's own request."""

    @pytest.mark.parametrize("late", [False, True], ids=["Submit first", "Next first"])
    @pytest.mark.parametrize("shown", [b"", b"another's", TICKETS.sign(replace(CLAIMS, attempt=2))])
    def test_a_next_with_anothers_ticket_is_refused_and_counted(self, shown: bytes, late: bool) -> None:
        async def scenario() -> None:
            faults = Faults()
            pair = await memory_pair(counters=faults)
            try:
                key, prompt = HandoffKey("r", 1), prompt_of(Random(1), 40)
                pair.d.prompts[key] = prompt
                offer = asyncio.ensure_future(pair.p.link.offer(key, pair.to_d, 40, 1, 30.0, shown))
                await asyncio.sleep(0.1 if late else 0)
                free = pair.d.pool.counts()
                ticket = TICKETS.sign(CLAIMS)
                pair.d.link.expect(key, prompt.ids, prompt.hashes, pair.to_p, 30.0, ticket=ticket)
                with pytest.raises(BadTicket):
                    await offer
                await pair.d.until_ended(key)
                error, blames = pair.d.aborted[key]
                assert (error.code, blames) == ("bad_ticket", pair.p.me)
                assert faults.faults == [(pair.p.me, "bad_ticket")]
                assert pair.d.reserved == [] and pair.d.pool.counts() == free
            finally:
                await pair.close()

        run_virtual(scenario())

    def test_the_same_ticket_is_granted(self) -> None:
        async def scenario() -> None:
            pair = await memory_pair()
            try:
                key, prompt = HandoffKey("r", 1), prompt_of(Random(1), 40)
                pair.d.prompts[key] = prompt
                ticket = TICKETS.sign(CLAIMS)
                pair.d.link.expect(key, prompt.ids, prompt.hashes, pair.to_p, 30.0, ticket=ticket)
                grant = await pair.p.link.offer(key, pair.to_d, 40, 1, 30.0, ticket)
                assert grant.key == key and pair.d.reserved == [key]
            finally:
                await pair.close()

        run_virtual(scenario())


class TestGate:
    def setup_method(self) -> None:
        self.ticket = TICKETS.sign(CLAIMS)
        self.p = Gate(TICKETS, info(P, Role.PREFILL))
        self.d = Gate(TICKETS, info(D, Role.DECODE))

    def test_one_ticket_is_for_both_workers_of_the_pair(self) -> None:
        self.p.admit(submit(D, self.ticket), as_source=True)
        self.d.admit(submit(P, self.ticket), as_source=False)

    def test_a_local_prefill_has_no_source(self) -> None:
        ticket = TICKETS.sign(replace(CLAIMS, source=None))
        with pytest.raises(BadTicket, match="source"):
            self.d.admit(submit(P, ticket), as_source=False)
        self.d.admit(submit(None, ticket), as_source=False)
        with pytest.raises(BadTicket, match="source"):
            self.d.admit(submit(None, self.ticket), as_source=False)

    def test_a_prefill_worker_hands_over_to_somebody(self) -> None:
        with pytest.raises(BadTicket, match="decode worker"):
            self.p.admit(submit(None, self.ticket), as_source=True)

    @pytest.mark.parametrize(
        "peer",
        [
            Peer(WorkerId("decode-0", 8), D.endpoint),
            Peer(WorkerId("decode-1", 7), D.endpoint),
            Peer(D.worker, "10.6.6.6:9000"),
        ],
        ids=["another incarnation", "another worker", "another endpoint"],
    )
    def test_a_peer_that_is_not_the_one_in_the_ticket_is_refused(self, peer: Peer) -> None:
        with pytest.raises(BadTicket, match="receiver"):
            self.p.admit(submit(peer, self.ticket), as_source=True)

    @pytest.mark.parametrize(
        ("name", "value"),
        [("request_id", "other"), ("attempt", 4), ("prompt_ids", (1, 2)), ("salt", b"other"), ("deadline_s", 31.0)],
    )
    def test_another_request_than_the_one_in_the_ticket_is_refused(self, name: str, value: object) -> None:
        with pytest.raises(BadTicket):
            self.p.admit(replace(submit(D, self.ticket), **{name: value}), as_source=True)  # type: ignore[arg-type]

    def test_a_worker_takes_no_ticket_of_its_predecessor(self) -> None:
        again = Gate(TICKETS, replace(info(P, Role.PREFILL), worker=WorkerId("prefill-0", 5)))
        with pytest.raises(BadTicket, match="source"):
            again.admit(submit(D, self.ticket), as_source=True)

    def test_a_ticket_is_let_in_once(self) -> None:
        self.d.admit(submit(P, self.ticket), as_source=False)
        with pytest.raises(BadTicket, match="used before"):
            self.d.admit(submit(P, self.ticket), as_source=False)

    def test_a_refusal_spends_nothing(self) -> None:
        with pytest.raises(BadTicket):
            self.d.admit(submit(None, self.ticket), as_source=False)
        self.d.admit(submit(P, self.ticket), as_source=False)

    def test_its_memory_is_bounded(self) -> None:
        gate = Gate(TICKETS, info(D, Role.DECODE), limit=2)
        tickets = [TICKETS.sign(replace(CLAIMS, tenant=str(n))) for n in range(3)]
        for ticket in tickets:
            gate.admit(submit(P, ticket), as_source=False)
        for ticket in tickets[1:]:
            with pytest.raises(BadTicket, match="used before"):
                gate.admit(submit(P, ticket), as_source=False)
        gate.admit(submit(P, tickets[0]), as_source=False)

    def test_a_loan_has_a_ticket_of_its_own_for_each_end(self) -> None:
        lent = IDS[:2]
        loan = replace(CLAIMS, purpose=Purpose.LEND, source=D, receiver=P, prefix=prefix_hash(lent, SALT), tokens=2)
        told = replace(submit(D, self.ticket), lender=D, lent_tokens=2, loan_ticket=TICKETS.sign(loan))
        lend = Lend(CLAIMS.request_id, CLAIMS.attempt, lent, P, 30.0, SALT, TICKETS.sign(loan))
        for wrong in (
            replace(told, lender=Peer(WorkerId("decode-9", 1), D.endpoint)),
            replace(told, lent_tokens=1),
            replace(told, loan_ticket=b""),
            replace(told, loan_ticket=self.ticket),
        ):
            with pytest.raises(BadTicket):
                self.p.admit(wrong, as_source=True)
        for wrong_lend in (replace(lend, peer=D), replace(lend, ticket=b""), replace(lend, salt=b"other")):
            with pytest.raises(BadTicket):
                self.d.lend(wrong_lend)
        self.p.admit(told, as_source=True)
        self.d.lend(lend)
        with pytest.raises(BadTicket, match="used before"):
            self.d.lend(lend)

    def test_a_gate_without_keys_is_open(self) -> None:
        Gate(None, info(D, Role.DECODE)).admit(submit(P, b""), as_source=False)

"""What the simulation has found, each as the smallest test that shows it."""

from __future__ import annotations

from core.messages import Receipt, Token, Tokens
from session.outlet import Outlet


async def test_a_receipt_is_not_lost_with_the_session_that_carried_it() -> None:
    """The prefill worker's token 0 had come; the decode worker's first message, which repeats it, was lost."""
    outlet = Outlet(lambda: 0.0)
    outlet.open("router", {})
    outlet.hold("router", ("r", 1))
    outlet.send([Tokens("r", 1, (Token(0, 0, 7),), Receipt(computed_tokens=5))])
    resumed, _ = outlet.open("router", {("r", 1): (1,)})
    batch = resumed.messages.get_nowait()
    assert [item.receipt for item in batch.items] == [Receipt(computed_tokens=5)]  # type: ignore[union-attr]

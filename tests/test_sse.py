"""Events are found wherever the network cuts the bytes."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from baton.sse import EventReader

STREAM = 'data: {"a": 1}\n\n: ping\n\ndata:{"b": "é\\n"}\r\n\r\nevent: x\ndata: 1\ndata: 2\n\ndata: [DONE]\n\n'.encode()
EVENTS = [b'{"a": 1}', '{"b": "é\\n"}'.encode(), b"1\n2", b"[DONE]"]


def test_a_whole_stream() -> None:
    assert EventReader().feed(STREAM) == EVENTS


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_any_cut_gives_the_same_events(cuts: list[int]) -> None:
    borders = [0, *sorted(cuts), len(STREAM)]
    reader = EventReader()
    found = []
    for start, end in pairwise(borders):
        found += reader.feed(STREAM[start:end])
    assert found == EVENTS

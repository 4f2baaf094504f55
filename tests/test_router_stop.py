"""No part of a stop string is given out, and the outcome does not depend on how the text arrives."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.stop import StopFilter


def run(stops: list[str], parts: list[str], include: bool = False) -> tuple[str, bool]:
    stop = StopFilter(stops, include)
    out = ""
    for part in parts:
        out += stop.feed(part)
        if stop.stopped:
            return out, True
    return out + stop.flush(), False


def reference(stops: list[str], text: str, include: bool) -> tuple[str, bool]:
    """Letter by letter: the first moment at which the text ends with a stop string; the longest such one."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            return (text[:end] if include else text[: end - max(map(len, ending))]), True
    return text, False


@pytest.mark.parametrize(
    ("stops", "parts", "expected"),
    [
        (["END"], ["a", "E", "N", "D", "b"], ("a", True)),
        (["END"], ["aEN", "d"], ("aENd", False)),
        (["END"], ["aEN"], ("aEN", False)),
        (["\n\n"], ["x\n", "\ny"], ("x", True)),
        (["aab"], ["aaa", "b"], ("a", True)),
        (["abc", "b"], ["ab"], ("a", True)),
        (["b", "abc"], ["abc"], ("a", True)),
        (["bc", "abc"], ["abc"], ("", True)),
        (["abcd", "bc"], ["ab", "c"], ("a", True)),
        (["日本"], ["今日", "本"], ("今", True)),
        (["😀"], ["x😀y"], ("x", True)),
    ],
)
def test_cases(stops: list[str], parts: list[str], expected: tuple[str, bool]) -> None:
    assert run(stops, parts) == expected


def test_the_stop_string_can_be_included() -> None:
    assert run(["END"], ["aE", "NDb"], include=True) == ("aEND", True)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    stop = StopFilter(["END", "xyz"])
    assert [stop.feed(part) for part in ("aE", "N", "x", "y", "E", "q")] == ["a", "", "EN", "", "xy", "Eq"]


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4),
    st.lists(st.text("abc", max_size=4), max_size=12),
    st.booleans(),
)
def test_equal_to_reading_letter_by_letter(stops: list[str], parts: list[str], include: bool) -> None:
    assert run(stops, parts, include) == reference(stops, "".join(parts), include)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=4), st.lists(st.text("abc", max_size=4)))
def test_what_is_out_never_ends_with_the_beginning_of_a_stop_string(stops: list[str], parts: list[str]) -> None:
    stop = StopFilter(stops)
    seen = out = ""
    for part in parts:
        seen += part
        out += stop.feed(part)
        if stop.stopped:
            return
        held = seen[len(out) :]
        assert out + held == seen
        endings = [seen[start:] for start in range(len(seen))]
        could_be = [ending for ending in endings if any(s.startswith(ending) for s in stops)]
        assert held == max(could_be, key=len, default="")

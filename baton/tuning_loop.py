"""Tries candidates one by one, and saves after each: what is tried was never tried before, and a stop loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from core.errors import BatonError
from kernels.gpu.tuning import Config, Entry, Trial, Tuned

MAX_REASON = 300  # characters kept of why a candidate failed


class GpuLost(Exception):
    """The candidate has broken this process's GPU context: nothing that it measures afterwards is true."""


class Case(Protocol):
    """One kernel at one shape."""

    @property
    def kernel(self) -> str: ...

    @property
    def shape(self) -> str: ...

    def default(self) -> Config: ...

    def candidates(self, default: Config) -> Sequence[Config]:
        """The default first."""
        ...


AnyCase = TypeVar("AnyCase", bound=Case)


def untried(tuned: Tuned, case: Case) -> tuple[Config, ...]:
    """The case's candidates that have no outcome yet, in their order."""
    entry = tuned.entries.get((case.kernel, case.shape), Entry())
    return tuple(config for config in case.candidates(case.default()) if not entry.tried(config))


def tune(
    tuned: Tuned,
    cases: Sequence[AnyCase],
    measure: Callable[[AnyCase, Config], float],
    save: Callable[[Tuned], None],
    tell: Callable[[AnyCase, Trial], None],
    in_time: Callable[[], bool],
) -> Tuned:
    """Everything that is not tried yet while `in_time` holds; asked before each candidate.

    `measure` gives microseconds. What it raises is the candidate's failure, and the next one follows; but a BatonError
    ends the loop without an outcome, and GpuLost after the outcome was saved: the next run goes on behind it.
    """
    for case, config in _work(tuned, cases):
        if not in_time():
            return tuned
        lost = None
        try:
            trial = Trial(config, time_us=measure(case, config))
        except BatonError:
            raise
        except GpuLost as error:
            trial, lost = Trial(config, failed=_reason(error)), error
        except Exception as error:  # noqa: BLE001  (compilers raise what they like; it is written down)
            trial = Trial(config, failed=_reason(error))
        entry = tuned.entries.get((case.kernel, case.shape), Entry())
        entry = Entry((*entry.trials, trial))
        left = [other for other in case.candidates(case.default()) if not entry.tried(other)]
        tuned = tuned.with_entry(case.kernel, case.shape, Entry(entry.trials, done=not left))
        save(tuned)
        tell(case, trial)
        if lost is not None:
            raise lost
    return tuned


def _work(tuned: Tuned, cases: Sequence[AnyCase]) -> Iterator[tuple[AnyCase, Config]]:
    for case in cases:
        for config in untried(tuned, case):
            yield case, config


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:MAX_REASON]

"""Which sequences a decode step advances: the running batch first, then a bounded amount of local prefill."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.policy import EngineView, SequenceView, StepPlan, chunks

PREFILL_FLOOR = 0.25  # of the cores, for a prefill that has waited too long, however long the steps are
LONGEST_PAUSE_S = 0.25  # above the floor: a gap between two tokens that people do not mind


@dataclass(slots=True)
class LocalBudget:
    """A token bucket for prefill on the decode worker, so that it costs the running batch a bounded share of time.

    While nothing decodes, the bucket does not apply: there is nobody to disturb.
    """

    tokens_per_s: float = 256.0
    burst_tokens: int = 512
    level_tokens: float = field(default=512.0)
    _at_s: float | None = None

    def available(self, now_s: float) -> int:
        elapsed_s = 0.0 if self._at_s is None else now_s - self._at_s
        self._at_s = now_s
        self.level_tokens = min(self.burst_tokens, self.level_tokens + elapsed_s * self.tokens_per_s)
        return int(self.level_tokens)

    def spend(self, tokens: int) -> None:
        self.level_tokens -= tokens


@dataclass(slots=True)
class DecodePolicy:
    """Running sequences all advance by one token; when pages run out, the youngest of the least urgent give way.

    The oldest of the most urgent is never preempted, so somebody always ends and frees pages.
    """

    max_rows: int = 256
    step_tokens: int = 512  # of local prefill in one step, at most
    local: LocalBudget | None = field(default_factory=LocalBudget)  # None: another policy prefills
    prefill_share: float = 0.5  # of the cores, left to a prefill on this machine that has waited too long
    prefill_patience_s: float = 0.5

    def plan(self, view: EngineView) -> StepPlan:
        decoding = sorted((s for s in view.sequences if s.decoding), key=_urgency)
        rows, preempt, pages = self._running(decoding[: self.max_rows], view.reusable_pages)
        local = self._local_prefill(view, len(rows), pages) if not preempt else []
        pause_s = self._pause_s(view) if rows else 0.0
        return StepPlan(tuple([(s.sequence_id, 1) for s in rows] + local), tuple(preempt), pause_s)

    def _running(self, decoding: list[SequenceView], pages: int) -> tuple[list[SequenceView], list[int], int]:
        """The rows that fit, whom to preempt for them, and the pages left."""
        preempt: list[int] = []
        needed = sum(max(0, s.pages_missing) for s in decoding)
        while needed > pages and len(decoding) > 1:
            victim = decoding.pop()
            needed -= max(0, victim.pages_missing)
            pages += victim.pages_held  # at most: shared ones stay; the next step finds out
            preempt.append(victim.sequence_id)
        return decoding, preempt, pages - needed

    def _local_prefill(self, view: EngineView, running: int, pages: int) -> list[tuple[int, int]]:
        if self.local is None:
            return []
        budget = self.local.available(view.now_s) if running else self.step_tokens
        order = sorted((s for s in view.sequences if not s.decoding), key=_urgency)
        room = pages - running  # a page of growth for each running sequence
        rows = chunks(view, order[: max(0, self.max_rows - running)], min(budget, self.step_tokens), room)
        if running:
            self.local.spend(sum(tokens for _, tokens in rows))
        return rows

    def _pause_s(self, view: EngineView) -> float:
        """Leave the cores so long that a share of the time is the prefill's, when it has waited past our patience."""
        if view.peer_wait_s < self.prefill_patience_s:
            return 0.0
        floor_s = view.step_s * PREFILL_FLOOR / (1.0 - PREFILL_FLOOR)
        wished_s = view.step_s * self.prefill_share / (1.0 - self.prefill_share)
        return max(min(wished_s, LONGEST_PAUSE_S), min(wished_s, floor_s))


def _urgency(sequence: SequenceView) -> tuple[int, bool, float, int]:
    return sequence.priority, not sequence.running, sequence.arrived_s, sequence.sequence_id

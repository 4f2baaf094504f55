"""Which prompt tokens a prefill step computes: a token budget, spent on the most urgent prompts first."""

from __future__ import annotations

from dataclasses import dataclass

from engine.policy import EngineView, StepPlan, chunks


@dataclass(frozen=True, slots=True)
class PrefillPolicy:
    """Priority, then earliest deadline, then arrival. One prompt is finished before the next is begun:

    two prompts sharing every step would both be late (processor sharing has the worse mean time to first token).
    """

    step_tokens: int = 512

    def plan(self, view: EngineView) -> StepPlan:
        order = [sequence for sequence in view.sequences if not sequence.decoding]
        order.sort(key=lambda s: (s.priority, not s.running, s.deadline_s, s.arrived_s, s.sequence_id))
        return StepPlan(tuple(chunks(view, order, self.step_tokens, view.reusable_pages)))

"""From a submitted attempt to sequences: which ids each choice begins with, and what is refused here."""

from __future__ import annotations

from dataclasses import dataclass

from core.clock import Clock
from core.errors import ContextTooLong, InvalidRequest
from core.hashing import root_hash
from core.messages import Submit
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Intake:
    """What a worker knows of its model that a sequence needs."""

    identity: str
    vocabulary: int
    max_context_tokens: int
    end_ids: tuple[int, ...]
    clock: Clock

    def check(self, submit: Submit) -> None:
        """Raises InvalidRequest: a worker trusts no length or id, whatever the router has checked."""
        if len(submit.prompt_ids) >= self.max_context_tokens:
            raise ContextTooLong(
                f"the prompt has {len(submit.prompt_ids)} tokens; with one more the context of "
                f"{self.max_context_tokens} is full",
                param="messages",
            )
        ids = (submit.prompt_ids, submit.params.stop_token_ids, tuple(submit.params.logit_bias), *submit.emitted)
        for part in ids:
            if part and not 0 <= min(part) <= max(part) < self.vocabulary:
                raise InvalidRequest(f"token ids must be between 0 and {self.vocabulary - 1}", param="prompt")
        if submit.emitted and len(submit.emitted) != submit.params.n:
            raise InvalidRequest("emitted ids must be given for every choice")

    def handoff_ids(self, submit: Submit) -> list[int]:
        """The ids whose KV is handed off: what all choices share. A lone choice takes its emitted ids along."""
        shared = submit.emitted[0] if submit.params.n == 1 and submit.emitted else ()
        return [*submit.prompt_ids, *shared]

    def shared(self, submit: Submit, sequence_id: int, *, single_step: bool) -> Sequence:
        """One sequence for all choices that still run, over the ids they share."""
        return self._sequence(submit, sequence_id, self.live_choices(submit), self.handoff_ids(submit), single_step)

    def separate(self, submit: Submit, sequence_id: int, choice: int) -> Sequence:
        """One choice with the ids that it has been given already."""
        return self._sequence(submit, sequence_id, (choice,), [*submit.prompt_ids, *submit.emitted[choice]], False)

    def live_choices(self, submit: Submit) -> tuple[int, ...]:
        return tuple(choice for choice in range(submit.params.n) if choice not in submit.finished)

    def parted(self, submit: Submit) -> bool:
        """Whether the choices have different ids already: a replay of several choices."""
        return submit.params.n > 1 and any(submit.emitted)

    def _sequence(
        self, submit: Submit, sequence_id: int, choices: tuple[int, ...], ids: list[int], single_step: bool
    ) -> Sequence:
        now_s = self.clock()
        return Sequence(
            sequence_id=sequence_id,
            request_id=submit.request_id,
            attempt=submit.attempt,
            choices=choices,
            ids=ids,
            prompt_tokens=len(submit.prompt_ids),
            params=submit.params,
            seed=submit.seed,
            root=root_hash(self.identity, salt=submit.salt),
            end_ids=self.end_ids,
            arrived_s=now_s,
            deadline_s=now_s + submit.deadline_s,
            priority=submit.priority,
            single_step=single_step,
            max_context_tokens=self.max_context_tokens,
        )

"""One choice of one request at this worker: its ids, its pages, how far its KV has been computed.

    ids        | prompt ............................ | output ......... |
    positions  0                     computed        prompt_tokens      len(ids)
               |--- KV is in `pages` ---|--- not computed yet ----------|

A sequence is ready to sample when `computed` reaches `len(ids)`: a prefill chunk and a decode token are the same thing.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, replace

from core.hashing import block_hashes
from core.messages import FinishReason
from core.sampling import SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"  # holds no pages: new, or preempted
    RUNNING = "running"  # holds pages for all its ids
    DEPARTED = "departed"  # finished, failed or cancelled


@dataclass(slots=True)
class Sequence:
    """Mutable; owned by the engine's thread."""

    sequence_id: int
    request_id: str
    attempt: int
    choices: tuple[int, ...]  # more than one: parts ways after the first sampled token
    ids: list[int]
    prompt_tokens: int  # ids[prompt_tokens:] are output
    params: SamplingParams
    seed: int
    root: bytes  # of its block hashes
    end_ids: tuple[int, ...]
    arrived_s: float
    deadline_s: float  # on this worker's clock
    priority: int = 0
    sample_last: bool = True  # False: only the KV is wanted
    single_step: bool = False  # prefill for a hand-off: ends after the first sampled token
    max_context_tokens: int = 2**31
    status: Status = Status.WAITING
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)  # block hashes of the full pages of `ids`, as far as known
    registered: int = 0  # full pages offered to the prefix cache
    cached_tokens: int = 0  # of the prefix found in the cache when it was first admitted
    preemptions: int = 0
    recomputed_tokens: int = 0
    first_admitted_s: float | None = None
    copy_from: int | None = None  # a page that it co-owns until its first step has copied it into its own tail

    @property
    def uncomputed(self) -> int:
        return len(self.ids) - self.computed

    @property
    def output_tokens(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def is_decoding(self) -> bool:
        """Its next row is one new token, not a part of its prompt.

        A replay that is prefilled for a hand-off never is, though its last id may be an output.
        """
        goes_on = self.status is Status.RUNNING and not self.single_step
        return goes_on and self.uncomputed == 1 and self.output_tokens > 0

    def full_hashes(self, page_size: int) -> list[bytes]:
        """Block hashes of every full page of the ids so far."""
        if len(self.hashes) < len(self.ids) // page_size:
            self.hashes = block_hashes(self.root, self.ids, page_size, self.hashes)
        return self.hashes

    def suppressed(self) -> tuple[int, ...]:
        """Ids that may not come yet: none of the ends before min_tokens, nor the model's own with ignore_eos."""
        if self.output_tokens < self.params.min_tokens:
            return self.end_ids + self.params.stop_token_ids
        return ()

    def finish_after(self, token_id: int) -> FinishReason | None:
        """Whether this token, about to be appended, is the last one."""
        output_tokens = self.output_tokens + 1
        if output_tokens > self.params.min_tokens:
            if token_id in self.params.stop_token_ids:
                return FinishReason.STOP
            if token_id in self.end_ids and not self.params.ignore_eos:
                return FinishReason.STOP
        if output_tokens >= self.params.max_tokens or len(self.ids) + 1 >= self.max_context_tokens:
            return FinishReason.LENGTH
        return None

    def twin(self, sequence_id: int, choice: int) -> Sequence:
        """The same ids for another choice, holding nothing yet."""
        return replace(
            self,
            sequence_id=sequence_id,
            choices=(choice,),
            ids=list(self.ids),
            hashes=list(self.hashes),
            pages=[],
            computed=0,
            registered=0,
            copy_from=None,
            status=Status.WAITING,
        )

"""What a request's client has been given: each index of each choice once, in order, whatever the workers repeat."""

from __future__ import annotations

from core.messages import Token, Tokens


class Progress:
    """Pure; one per request, over all its attempts."""

    def __init__(self, choices: int, max_tokens: int) -> None:
        self.emitted: list[list[int]] = [[] for _ in range(choices)]
        self._finished: set[int] = set()
        self._max_tokens = max_tokens

    def accept(self, item: Tokens) -> tuple[Token, ...]:
        """The tokens that are the next of their choice; repeats, and what is past a finish, are dropped.

        A token past the next index cannot be emitted: a message was lost, and the session's resumption brings it again.
        """
        fresh = []
        for token in item.tokens:
            known = 0 <= token.choice < len(self.emitted) and token.choice not in self._finished
            if not known or token.index != len(self.emitted[token.choice]):
                continue
            self.emitted[token.choice].append(token.token_id)
            if token.finish is not None:
                self._finished.add(token.choice)
            fresh.append(token)
        return tuple(fresh)

    def finish(self, choice: int) -> None:
        """The front has ended this choice itself."""
        self._finished.add(choice)

    def next_index(self) -> list[int]:
        """Per choice, the first index that has not been emitted."""
        return [len(ids) for ids in self.emitted]

    @property
    def finished(self) -> tuple[int, ...]:
        return tuple(sorted(self._finished))

    @property
    def is_done(self) -> bool:
        return len(self._finished) == len(self.emitted)

    @property
    def has_emitted(self) -> bool:
        return any(self.emitted)

    def emitted_ids(self) -> tuple[tuple[int, ...], ...]:
        """For the next attempt: per choice; empty when nothing has been emitted."""
        return tuple(map(tuple, self.emitted)) if self.has_emitted else ()

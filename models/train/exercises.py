"""Exercises made from a seed: recall, repeat and sums, as chat messages with the expected answer.

This module needs only the standard library and words.txt beside it. Tests, the evaluation and the
training data share it. Each dialogue starts with the material and one question; training asks further
questions on the same material, so that one list of pairs teaches many times.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import random

Message = dict[str, str]

STYLES: dict[str, tuple[str, str]] = {
    "equals": ("{key}={value}", "{key}=?"),
    "dict": ('"{key}": "{value}",', '"{key}"?'),
    "call": ('record("{key}", value="{value}")', 'What is the value of "{key}"?'),
    "prose": ('The value of "{key}" is "{value}".', 'What is the value of "{key}"?'),
}
LONG_STYLES = ("call", "prose")
RECALL_INTRO = "Remember these pairs:"
REPEAT_INTRO = "Repeat this text:"


@dataclasses.dataclass(frozen=True)
class Exercise:
    """Chat messages that end with a question, and the one right answer to it."""

    messages: list[Message]
    answer: str


@functools.cache
def word_pool() -> tuple[str, ...]:
    """The common words that keys, values and texts to repeat are made of."""
    path = pathlib.Path(__file__).resolve().parent / "words.txt"
    return tuple(path.read_text(encoding="utf-8").split())


def _turns(questions: list[str], answers: list[str]) -> list[Message]:
    """User and assistant turns, one pair for each question."""
    messages = []
    for question, answer in zip(questions, answers, strict=True):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _with_filler(rng: random.Random, lines: list[str], words: list[str], count: int) -> list[str]:
    """The lines in order, with `count` comment lines of eight random words put between them."""
    mixed = list(lines)
    for _ in range(count):
        mixed.insert(rng.randrange(len(mixed) + 1), "# " + " ".join(rng.choices(words, k=8)))
    return mixed


def recall_dialogue(
    rng: random.Random, pairs: int, questions: int, style: str, filler: int = 0, digits: bool = False
) -> list[Message]:
    """Pairs of a key and a value, then questions on them, each with its answer.

    Keys are distinct, no value is a key, and `filler` comment lines lie between the pairs. With
    `digits` the values are numbers of three digits instead of words.
    """
    words = rng.sample(word_pool(), len(word_pool()))
    keys, values, rest = words[:pairs], words[pairs : 2 * pairs], words[2 * pairs :]
    if digits:
        values = [str(number) for number in rng.sample(range(100, 1000), pairs)]
    line, question = STYLES[style]
    lines = [line.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
    lines = _with_filler(rng, lines, rest, filler)
    asked = rng.sample(range(pairs), min(questions, pairs)) + rng.choices(range(pairs), k=max(0, questions - pairs))
    texts = [question.format(key=keys[index]) for index in asked]
    texts[0] = "\n".join([RECALL_INTRO, *lines, "", texts[0]])
    return _turns(texts, [values[index] for index in asked])


def recall_exercise(
    rng: random.Random, pairs: int = 64, style: str | None = None, filler: int | None = None
) -> Exercise:
    """One question on `pairs` random pairs; 64 of them make a prompt of roughly 500 to 1,500 tokens."""
    chosen = style if style is not None else rng.choice(LONG_STYLES)
    lines = filler if filler is not None else rng.randrange(pairs // 2 + 1)
    messages = recall_dialogue(rng, pairs, 1, chosen, lines)
    return Exercise(messages[:-1], messages[-1]["content"])


def repeat_text(rng: random.Random, words: int) -> str:
    """Distinct random words, one in eight of them a number of one to three digits."""
    chosen = rng.sample(word_pool(), words)
    return " ".join(str(rng.randrange(1000)) if rng.random() < 0.125 else word for word in chosen)


def repeat_dialogue(rng: random.Random, sizes: list[int]) -> list[Message]:
    """Texts of random words to repeat, one for each size."""
    texts = [repeat_text(rng, size) for size in sizes]
    return _turns([f"{REPEAT_INTRO}\n{text}" for text in texts], texts)


def repeat_exercise(rng: random.Random, words: int | None = None) -> Exercise:
    """One text to repeat, by default of 20 to 60 words: 20 to about 150 tokens."""
    size = words if words is not None else rng.randint(20, 60)
    messages = repeat_dialogue(rng, [size])
    return Exercise(messages[:-1], messages[-1]["content"])


def sum_dialogue(rng: random.Random, questions: int, limit: int = 100) -> list[Message]:
    """Small sums of two numbers below `limit`."""
    terms = [(rng.randrange(limit), rng.randrange(limit)) for _ in range(questions)]
    return _turns([f"{a}+{b}=?" for a, b in terms], [str(a + b) for a, b in terms])


def sum_exercise(rng: random.Random, limit: int = 100) -> Exercise:
    """One small sum."""
    messages = sum_dialogue(rng, 1, limit)
    return Exercise(messages[:-1], messages[-1]["content"])

"""Rows of tokens to train on: windows of the corpus and dialogues of exercises, from a seed and a step."""

from __future__ import annotations

import json
import pathlib
import random
from collections.abc import Callable

import numpy as np
import tokenizers
import torch
from torch import Tensor

import corpus
import exercises
from exercises import Message

KINDS = ("code", "recall", "repeat", "sum", "complete")
END, START, STOP = 0, 1, 2
IGNORED = -100
TOKENS_PER_PAIR = {"equals": 4, "dict": 7, "call": 9, "prose": 11}
TOKENS_PER_QUESTION = {"equals": 14, "dict": 14, "call": 19, "prose": 19}


def prepare(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write the tokenised corpus and the functions to complete into the work folder, once."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "functions.json").exists():
        return
    texts = corpus.training_texts()
    ids = [token for text in texts for token in (END, *tokenizer.encode(text).ids)]
    np.array(ids, dtype=np.uint16).tofile(folder / "code.bin")
    functions = [function for text in texts for function in corpus.functions(text)]
    (folder / "functions.json").write_text(json.dumps(functions), encoding="utf-8")


def render(messages: list[Message]) -> str:
    """A dialogue as the chat template writes it."""
    return "".join(f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n" for message in messages)


class Rows:
    """Makes the rows of each step."""

    def __init__(self, folder: pathlib.Path, tokenizer: tokenizers.Tokenizer, seed: int) -> None:
        """Open the prepared corpus."""
        prepare(folder, tokenizer)
        self.code = np.memmap(folder / "code.bin", dtype=np.uint16, mode="r")
        self.functions: list[list[str]] = json.loads((folder / "functions.json").read_text(encoding="utf-8"))
        self.tokenizer, self.seed = tokenizer, seed
        self.assistant = tokenizer.encode("assistant").ids[0]
        self.makers: dict[str, Callable[[random.Random, int], list[Message]]] = {
            "recall": self._recall,
            "repeat": self._repeat,
            "sum": self._sum,
            "complete": self._complete,
        }

    def _recall(self, rng: random.Random, length: int) -> list[Message]:
        """One list of pairs that takes a part of the row, and questions on it for the rest."""
        style = rng.choices(list(exercises.STYLES), (3, 3, 2, 2))[0]
        room = length - 16
        part = rng.uniform(0.2, 0.8)
        pairs = max(2, min(96, int(room * part / TOKENS_PER_PAIR[style])))
        filler = rng.randrange(int(room * (0.9 - part) / 16) + 1) if rng.random() < 0.4 else 0
        used = pairs * TOKENS_PER_PAIR[style] + filler * 15
        questions = max(1, (room - used) // TOKENS_PER_QUESTION[style] + 1)
        return exercises.recall_dialogue(rng, pairs, questions, style, filler, rng.random() < 0.1)

    def _repeat(self, rng: random.Random, length: int) -> list[Message]:
        """Texts to repeat: random words, and one in four times lines of code."""
        messages: list[Message] = []
        room = length
        while room > 0:
            size = rng.randint(4, max(8, min(60, length // 8)))
            if rng.random() < 0.25:
                start = rng.randrange(len(self.code) - 2 * size)
                lines = self.tokenizer.decode(self.code[start : start + 2 * size].tolist()).split("\n")[1:-1]
                text = "\n".join(lines).strip() or "pass"
                turn = [f"{exercises.REPEAT_INTRO}\n{text}", text]
                messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
            else:
                messages += exercises.repeat_dialogue(rng, [size])
            room -= int(3.2 * size) + 14
        return messages

    def _sum(self, rng: random.Random, length: int) -> list[Message]:
        """Sums until the row is full."""
        return exercises.sum_dialogue(rng, length // 18 + 1, rng.choice((10, 100)))

    def _complete(self, rng: random.Random, length: int) -> list[Message]:
        """Functions to complete until the row is full."""
        messages: list[Message] = []
        room = length
        while room > 0:
            head, body = rng.choice(self.functions)
            messages += [
                {"role": "user", "content": f"Complete this function:\n{head}"},
                {"role": "assistant", "content": f"{head}\n{body}"},
            ]
            room -= (2 * len(head) + len(body)) // 4 + 16
        return messages

    def _mask(self, ids: list[int]) -> list[int]:
        """The tokens, with all that no assistant wrote replaced by IGNORED."""
        targets, writing = [], False
        for index, token in enumerate(ids):
            targets.append(token if writing else IGNORED)
            if token == STOP:
                writing = False
            elif index >= 2 and ids[index - 1] == self.assistant and ids[index - 2] == START:
                writing = True
        return targets

    def _row(self, rng: random.Random, kind: str, length: int) -> tuple[list[int], list[int]]:
        """Tokens and targets of one row, one token longer than the row."""
        if kind == "code":
            start = rng.randrange(len(self.code) - length - 1)
            window = self.code[start : start + length + 1].tolist()
            return window, window
        ids = self.tokenizer.encode(render(self.makers[kind](rng, length))).ids[: length + 1]
        pad = length + 1 - len(ids)
        return ids + [END] * pad, self._mask(ids) + [IGNORED] * pad

    def batch(self, step: int, length: int, rows: int, mixture: list[float]) -> tuple[Tensor, Tensor, Tensor]:
        """The inputs, targets and kinds of one step; the mixture gives the share of rows of each kind."""
        rng = random.Random(f"{self.seed}/{step}")
        offset, kinds = rng.random(), []
        for row in range(rows):
            point, kind = (row + offset) / rows * sum(mixture), 0
            while kind < len(mixture) - 1 and point >= mixture[kind]:
                point, kind = point - mixture[kind], kind + 1
            kinds.append(kind)
        made = [self._row(rng, KINDS[kind], length) for kind in kinds]
        ids = torch.tensor([tokens for tokens, _ in made])
        targets = torch.tensor([target for _, target in made])
        return ids[:, :-1].contiguous(), targets[:, 1:].contiguous(), torch.tensor(kinds)

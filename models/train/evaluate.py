"""Measure an exported model through transformers, as it is served: bfloat16 weights, greedy answers.

Usage: python evaluate.py MODEL_DIR [--count 200] [--seed 1000]
"""

from __future__ import annotations

import argparse
import ast
import functools
import json
import math
import random
import textwrap
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

import corpus
import exercises

WINDOW = 1024


class Served:
    """A model and its tokenizer, loaded from a folder."""

    def __init__(self, folder: str) -> None:
        """Load both; a loaded model is in evaluation mode."""
        self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)

    def generate(self, ids: list[int], limit: int) -> str:
        """The greedy continuation of a prompt, without special tokens."""
        tokens = torch.tensor([ids])
        out = self.model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=limit)
        return str(self.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))

    def prompt(self, exercise: exercises.Exercise) -> list[int]:
        """The tokens of an exercise through the chat template."""
        text = self.tokenizer.apply_chat_template(exercise.messages, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer(text).input_ids)

    def is_right(self, exercise: exercises.Exercise) -> bool:
        """Whether the greedy answer, with its end, is the expected one.

        One pass over prompt and answer tells: greedy decoding gives the answer if, and only if, each of its
        tokens is the likeliest after those before it.
        """
        prompt = self.prompt(exercise)
        answer = [*self.tokenizer(exercise.answer).input_ids, self.tokenizer.eos_token_id]
        tokens = torch.tensor([[*prompt, *answer[:-1]]])
        with torch.no_grad():
            logits = self.model(tokens, logits_to_keep=len(answer)).logits
        return bool((logits[0].argmax(-1) == torch.tensor(answer)).all())


def bits_per_byte(served: Served) -> float:
    """The model's loss on the held-out modules; each token is predicted from 512 to 1,023 before it."""
    text = corpus.heldout_text()
    ids = served.tokenizer(text).input_ids
    bits, half = 0.0, WINDOW // 2
    for start in range(0, len(ids) - 1, half):
        begin = max(0, start - half)
        window = torch.tensor(ids[begin : start + half + 1])
        with torch.no_grad():
            logits = served.model(window[None, :-1]).logits[0].float()
        losses = torch.nn.functional.cross_entropy(logits, window[1:], reduction="none")
        bits += float(losses[start - begin :].sum()) / math.log(2)
    return bits / len(text.encode())


def completion_prompts(count: int, seed: int) -> list[str]:
    """Beginnings of held-out functions: the signature, the docstring, and some lines of the body."""
    functions = corpus.functions(corpus.heldout_text(), max_lines=60, methods=True)
    rng, prompts = random.Random(seed), []
    for _ in range(count):
        head, body = rng.choice(functions)
        lines = body.splitlines()
        prompts.append("\n".join([head, *lines[: rng.randrange(min(4, len(lines)))]]) + "\n")
    return prompts


def first_function(prompt: str, completion: str) -> str:
    """The text up to the end of the function that the prompt begins; an unfinished last line is dropped."""
    lines = completion.split("\n")[:-1]
    kept = []
    for line in lines:
        if line and not line[0].isspace():
            break
        kept.append(line)
    return prompt + "\n".join(kept) + "\n"


def parses(text: str) -> bool:
    """Whether Python can parse the text."""
    try:
        ast.parse(textwrap.dedent(text))
    except (SyntaxError, ValueError):
        return False
    return True


def parse_share(served: Served, count: int, seed: int) -> float:
    """The share of greedy completions of 96 tokens that parse."""
    right = 0
    for prompt in completion_prompts(count, seed):
        completion = served.generate(list(served.tokenizer(prompt).input_ids), 96)
        right += parses(first_function(prompt, completion))
    return right / count


def accuracy(served: Served, make: Callable[[random.Random], exercises.Exercise], count: int, seed: int) -> float:
    """The share of exercises answered exactly."""
    rng = random.Random(seed)
    return sum(served.is_right(make(rng)) for _ in range(count)) / count


def main() -> None:
    """Print every measure as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(2)
    served, results, begun = Served(options.model), {}, time.monotonic()
    results["recall"] = accuracy(served, exercises.recall_exercise, options.count, options.seed)
    for style in exercises.STYLES:
        make = functools.partial(exercises.recall_exercise, style=style)
        results[f"recall {style}"] = accuracy(served, make, options.count // 4, options.seed + 1)
    results["repeat"] = accuracy(served, exercises.repeat_exercise, options.count, options.seed)
    results["sum"] = accuracy(served, exercises.sum_exercise, options.count, options.seed)
    results["bits per byte"] = bits_per_byte(served)
    results["parse"] = parse_share(served, 100, options.seed)
    results["seconds"] = time.monotonic() - begun
    print(json.dumps({name: round(value, 4) for name, value in results.items()}, indent=2))


if __name__ == "__main__":
    main()

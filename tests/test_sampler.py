"""The sampler against slow plain references, its distribution by chi-square, and what it may not depend on."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.batch import SampleSpec
from engine.filters import candidates
from engine.sampler import Draw, adjusted, sample_rows
from kernels.gumbel import REACH, gumbel_noise_reference

V = 50
GREEDY = {"temperature": 0.0}


def draw(history: tuple[int, ...] = (1, 2, 3), prompt_tokens: int = 2, seed: int = 4, **params: Any) -> Draw:
    spec_fields = {name: params.pop(name) for name in ("choices", "suppress", "allowed") if name in params}
    fields = {"choices": (0,), **spec_fields}
    return Draw(SampleSpec(SamplingParams(**params), seed, history=history, prompt_tokens=prompt_tokens, **fields), 3)


def one(logits: torch.Tensor, asked: Draw) -> list[int]:
    result = sample_rows(logits[None], [asked])[0]
    assert result.error is None, result.error
    return [token.token_id for token in result.sampled]


def logits_of(seed: int, size: int = V, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * spread


def slow_filter(logits: torch.Tensor, params: SamplingParams) -> set[int]:
    """The ids that the filters leave, by their definitions, in double precision. Logits without equals."""
    scaled = logits.double() / params.temperature
    kept = list(range(len(scaled)))
    if params.top_k:
        kept = sorted(kept, key=lambda i: -scaled[i])[: params.top_k]
    if params.top_p < 1.0:
        p = renormalised(scaled, kept)
        ordered, total, nucleus = sorted(kept, key=lambda i: -p[i]), 0.0, []
        while ordered and total < params.top_p:
            nucleus.append(ordered.pop(0))
            total += p[nucleus[-1]]
        kept = nucleus
    p = renormalised(scaled, kept)
    kept = [i for i in kept if p[i] >= params.min_p * max(p.values())]
    if params.typical_p < 1.0:
        p = renormalised(scaled, kept)
        entropy = -sum(x * math.log(x) for x in p.values())
        ordered, total, typical = sorted(kept, key=lambda i: abs(-math.log(p[i]) - entropy)), 0.0, []
        while ordered and total < params.typical_p:
            typical.append(ordered.pop(0))
            total += p[typical[-1]]
        kept = typical
    return set(kept)


def renormalised(scaled: torch.Tensor, kept: list[int]) -> dict[int, float]:
    values = scaled[kept].softmax(0).tolist()
    return dict(zip(kept, values, strict=True))


FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 5},
    {"top_k": 1},
    {"top_p": 0.8},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"typical_p": 0.7},
    {"top_k": 20, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
]


@pytest.mark.parametrize("fields", FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_filters_leave_what_their_definitions_leave(fields: dict[str, Any], temperature: float) -> None:
    params = SamplingParams(temperature=temperature, **fields)
    for seed in range(10):
        logits = logits_of(seed)
        ids, values = candidates(logits, params)
        expected = slow_filter(logits, params)
        least = float(logits.max()) - REACH * temperature
        assert {i for i in expected if logits[i] > least} <= set(ids.tolist()) <= expected
        assert sorted(ids.tolist()) == ids.tolist()
        np.testing.assert_allclose(values, (logits[ids] - logits.max()) / temperature, rtol=1e-5)


@pytest.mark.parametrize("fields", FILTERS, ids=str)
def test_the_choice_is_the_best_of_logit_and_noise(fields: dict[str, Any]) -> None:
    for seed in range(20):
        logits = logits_of(seed)
        asked = draw(seed=seed, temperature=0.8, choices=(0, 3, 7), **fields)
        left = slow_filter(logits, asked.spec.params)
        for choice, got in zip((0, 3, 7), one(logits, asked), strict=True):
            noisy = {i: float(logits[i]) / 0.8 + gumbel_noise_reference(i, seed, choice, 3) for i in left}
            assert got == max(noisy, key=lambda i: noisy[i])


def test_pruning_by_the_bound_never_changes_the_choice() -> None:
    """A wide spread, so that most ids are out of reach, against noise for every id."""
    for seed in range(30):
        logits = logits_of(seed, size=400, spread=12.0)
        noisy = [float(x) + gumbel_noise_reference(i, seed, 0, 3) for i, x in enumerate(logits)]
        assert len(candidates(logits, SamplingParams())[0]) < 400
        assert one(logits, draw(seed=seed)) == [int(np.argmax(noisy))]


@pytest.mark.parametrize("fields", [{}, {"top_k": 6}, {"top_p": 0.7}, {"temperature": 1.7}], ids=str)
def test_the_distribution_is_that_of_the_softmax(fields: dict[str, Any]) -> None:
    """Chi-square over 20,000 draws with fixed seeds, at a quantile that one in 10,000 fair samplers would miss."""
    logits = logits_of(1, size=12, spread=1.0)
    params = SamplingParams(**fields)
    draws = 20_000
    asked = draw(choices=tuple(range(draws)), **fields)
    counts = np.bincount(one(logits, asked), minlength=12)
    left = sorted(slow_filter(logits, params))
    p = (logits[left].double() / params.temperature).softmax(0).numpy()
    assert counts.sum() == counts[left].sum() == draws
    statistic = float(((counts[left] - draws * p) ** 2 / (draws * p)).sum())
    freedom = len(left) - 1
    # Wilson and Hilferty's approximation of the chi-square quantile; 3.72 is the normal quantile of 1 - 1e-4.
    limit = freedom * (1 - 2 / (9 * freedom) + 3.72 * math.sqrt(2 / (9 * freedom))) ** 3
    assert statistic < limit


def test_positions_and_seeds_draw_independently() -> None:
    logits = logits_of(2, size=8, spread=0.5)
    by_position = [one(logits, Draw(draw().spec, length))[0] for length in range(400)]
    by_seed = [one(logits, draw(seed=seed))[0] for seed in range(400)]
    for tokens in (by_position, by_seed):
        assert len(set(tokens)) == 8
        repeats = sum(a == b for a, b in pairwise(tokens))
        assert repeats < 130  # far from always the same; about 50 to 80 are expected


def test_a_row_does_not_depend_on_its_batch() -> None:
    asked = [
        draw(),
        draw(**GREEDY),
        draw(top_p=0.5, logprobs=3),
        draw(presence_penalty=1.0),
        draw(top_k=3, choices=(0, 1)),
    ]
    logits = torch.stack([logits_of(i) for i in range(len(asked))])
    together = sample_rows(logits, asked)
    assert together == [sample_rows(logits[i : i + 1], [asked[i]])[0] for i in range(len(asked))]
    assert together[::-1] == sample_rows(logits.flip(0), asked[::-1])


def test_a_choice_draws_the_same_noise_whatever_the_filters() -> None:
    """A filter that keeps the winner does not change it."""
    for seed in range(50):
        logits = logits_of(seed, spread=1.0)
        free = one(logits, draw(seed=seed))[0]
        rank = int((logits > logits[free]).sum()) + 1
        assert one(logits, draw(seed=seed, top_k=rank))[0] == free


def test_greedy_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(V)
    logits[[7, 30]] = 2.0
    assert one(logits, draw(**GREEDY)) == [7]
    assert one(logits, draw(**GREEDY, choices=(0, 1, 2))) == [7, 7, 7]
    assert one(logits, draw(**GREEDY, suppress=(7,))) == [30]


def test_equals_at_the_cut_of_top_k_are_kept() -> None:
    ids, _ = candidates(torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0]), SamplingParams(top_k=2))
    assert ids.tolist() == [1, 2, 3]


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, V - 1), min_size=1, max_size=60),
    prompt_share=st.floats(0, 1),
    repetition=st.sampled_from([1.0, 0.5, 1.3]),
    presence=st.sampled_from([0.0, 1.5, -1.0]),
    frequency=st.sampled_from([0.0, 0.7, -0.3]),
)
def test_penalties_are_as_defined(
    history: list[int], prompt_share: float, repetition: float, presence: float, frequency: float
) -> None:
    prompt_tokens = int(prompt_share * len(history))
    params = SamplingParams(
        repetition_penalty=repetition, presence_penalty=presence, frequency_penalty=frequency, logit_bias={3: 2.5}
    )
    logits = logits_of(len(history))
    expected = logits.tolist()
    for i in set(history):  # repetition: prompt and output alike
        expected[i] = expected[i] * repetition if expected[i] < 0 else expected[i] / repetition
    for i in set(history[prompt_tokens:]):  # presence and frequency: the output alone
        expected[i] -= presence + frequency * history[prompt_tokens:].count(i)
    expected[3] += 2.5
    spec = SampleSpec(params, 0, (0,), history, prompt_tokens)
    torch.testing.assert_close(adjusted(logits, spec, len(history)), torch.tensor(expected))


def test_ids_beyond_the_vocabulary_have_no_penalty_and_no_bias() -> None:
    asked = draw(history=(1, V + 100, 3), repetition_penalty=2.0, logit_bias={V + 5: 100.0, 4: 50.0}, **GREEDY)
    assert one(logits_of(0), asked) == [4]


def test_bias_masks_and_suppression() -> None:
    logits = logits_of(5)
    best = int(logits.argmax())
    assert one(logits, draw(**GREEDY, logit_bias={best: -100.0}))[0] != best
    allowed = torch.zeros(V, dtype=torch.bool)
    allowed[9] = True
    for params in (GREEDY, {"temperature": 2.0}, {"top_k": 3}, {"typical_p": 0.5}):
        assert one(logits, draw(**params, allowed=allowed)) == [9]
    nothing = sample_rows(logits[None], [draw(allowed=torch.zeros(V, dtype=torch.bool))])[0]
    assert nothing.error == "no token is allowed here" and not nothing.sampled
    misfit = sample_rows(logits[None], [draw(allowed=torch.ones(V + 1, dtype=torch.bool))])[0]
    assert misfit.error is not None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("params", [GREEDY, {}, {"top_p": 0.5}, {"logprobs": 2}], ids=str)
def test_logits_that_are_not_finite_are_the_error_of_their_row(bad: float, params: dict[str, Any]) -> None:
    logits = torch.stack([logits_of(i) for i in range(3)])
    expected = sample_rows(logits, [draw(**params)] * 3)
    logits[1, 20] = bad
    results = sample_rows(logits, [draw(**params)] * 3)
    assert results[0] == expected[0] and results[2] == expected[2]
    assert results[1].error is not None and not results[1].sampled


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(8)
    asked = draw(temperature=0.3, top_k=2, presence_penalty=2.0, logprobs=4, choices=(0, 1))
    expected = logits.log_softmax(0)
    for token in sample_rows(logits[None], [asked])[0].sampled:
        assert token.logprob == pytest.approx(float(expected[token.token_id]), abs=1e-6)
        assert [i for i, _ in token.top] == expected.argsort(descending=True)[:4].tolist()
        assert [p for _, p in token.top] == pytest.approx(expected.sort(descending=True).values[:4].tolist(), abs=1e-6)
    chosen_only = sample_rows(logits[None], [draw(logprobs=0)])[0].sampled[0]
    assert chosen_only.logprob is not None and chosen_only.top == ()
    assert sample_rows(logits[None], [draw()])[0].sampled[0].logprob is None


def test_equally_likely_tokens_are_reported_lowest_ids_first() -> None:
    top = sample_rows(torch.zeros(1, V), [draw(**GREEDY, logprobs=5)])[0].sampled[0].top
    assert [i for i, _ in top] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 5e-324])
def test_tiny_temperatures_are_greedy_and_do_not_overflow(temperature: float) -> None:
    logits = logits_of(3)
    assert one(logits, draw(temperature=temperature)) == [int(logits.argmax())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    logits = logits_of(4).to(dtype)
    assert one(logits, draw()) == one(logits.float(), draw())


def test_the_history_before_the_token_counts_and_not_what_follows() -> None:
    """Drafted ids that come later do not change what is sampled before them."""
    logits = logits_of(6)
    asked = draw(history=(1, 2, 3), repetition_penalty=3.0, presence_penalty=1.0)
    longer = Draw(replace(asked.spec, history=(1, 2, 3, 4, 5)), 3)
    assert one(logits, asked) == one(logits, longer)

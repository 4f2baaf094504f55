"""Tokens chosen where the logits are equal those that the engine's sampler chooses, and a plain reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from core.sampling import SamplingParams
from engine.batch import SampleSpec
from engine.sampler import Draw as EngineDraw
from engine.sampler import sample_rows
from kernels.gpu.sample import BLOCK, LISTED, Draw, pack_draws, sample, sample_reference
from tests.kernels_gpu.pairwise import pairwise

SEED = -(2**63) + 12345
CASES = pairwise(
    {
        "vocabulary": [5, 211, BLOCK + 3],
        "spread": [0.1, 6.0],
        "temperature": [0.0, 1e-6, 0.7, 2.0],
        "top_k": [0, 1, 40],
        "top_p": [1.0, 0.9, 1e-6],
        "min_p": [0.0, 0.05, 1.0],
        "ties": [False, True],
    }
)


def logits_of(rows: int, vocabulary: int, spread: float, ties: bool, seed: int = 0) -> torch.Tensor:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * spread
    return (logits * 2).round() / 2 if ties else logits


def by_engine(logits: torch.Tensor, draws: Sequence[Draw]) -> list[int]:
    """The ids that the CPU path gives."""
    rows = []
    for draw in draws:
        params = SamplingParams(
            temperature=draw.temperature, top_k=draw.top_k, top_p=draw.top_p, min_p=draw.min_p, max_tokens=9
        )
        rows.append(EngineDraw(SampleSpec(params, draw.seed, (draw.choice,), (), 0), draw.position))
    results = sample_rows(logits[[draw.row for draw in draws]], rows)
    return [result.sampled[0].token_id if result.error is None else -1 for result in results]


def on_device(
    logits: torch.Tensor, draws: Sequence[Draw], device: torch.device, splits: int | None = None
) -> list[int]:
    packed = torch.from_numpy(pack_draws(draws)).to(device)
    noise, filters = any(draw.temperature > 0 for draw in draws), any(draw.filters for draw in draws)
    return sample(logits.to(device), packed, noise, filters, splits=splits).tolist()


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(str(value) for value in case.values()))
def test_the_choice_is_the_samplers(case: dict[str, float], device: torch.device) -> None:
    logits = logits_of(3, int(case["vocabulary"]), case["spread"], bool(case["ties"]))
    filters = {"top_k": int(case["top_k"]), "top_p": case["top_p"], "min_p": case["min_p"]}
    draws = [Draw(2 - i, case["temperature"], **filters, seed=SEED + i, choice=i, position=7 * i) for i in range(2)]
    expected = by_engine(logits, draws)
    assert on_device(logits, draws, device) == expected
    assert sample_reference(logits, draws).tolist() == expected


def test_rows_of_every_kind_share_a_call(device: torch.device) -> None:
    """Greedy, plain, filtered, poisoned and a shared row; the same however the vocabulary is split."""
    logits = logits_of(5, 2 * BLOCK + 17, 3.0, False)
    logits[2, 2000] = math.nan
    logits[3, 5] = -math.inf
    draws = [
        Draw(0),
        Draw(0, 1.0, seed=4, choice=1, position=2),
        Draw(1, 0.8, top_k=20, top_p=0.7, seed=2**63 - 1, position=2**31 - 1),
        Draw(2, 1.0, top_k=3),
        Draw(3),
        Draw(4, 1.3, top_p=0.95, min_p=0.001, seed=-1, position=1 << 20),
    ]
    expected = by_engine(logits, draws)
    assert expected[3:5] == [-1, -1]
    for splits in (1, 3):
        assert on_device(logits, draws, device, splits) == expected


def test_equal_logits_go_to_the_lowest_id_and_a_nucleus_is_cut_by_id(device: torch.device) -> None:
    logits = torch.zeros(1, 700)
    logits[0, 300:] = 4.0
    draws = [Draw(0, 1.0, top_p=0.25, seed=i, position=i) for i in range(5)]
    expected = by_engine(logits, draws)
    assert on_device(logits, draws, device) == expected and on_device(logits, [Draw(0)], device) == [300]
    # A quarter of the mass lies with the first hundred of the 400 likely ones.
    assert min(expected) >= 300 and max(expected) < 402


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_widened(dtype: torch.dtype, device: torch.device) -> None:
    logits = logits_of(4, 1500, 4.0, False).to(dtype)
    draws = [Draw(i, t, top_k=50, seed=i) for i, t in enumerate((0.0, 0.5, 1.0, 1.5))]
    assert on_device(logits, draws, device) == by_engine(logits, draws)


def test_the_last_id_that_a_filter_keeps_is_kept_and_the_next_is_not(device: torch.device) -> None:
    """Draws whose noise lifts an unlikely id to the top, with each filter's bound just before and just behind it."""
    logits = logits_of(1, 60, 1.0, False)
    order = logits[0].argsort(descending=True).tolist()
    before = logits[0].double().softmax(0)[order].cumsum(0).roll(1)  # the mass before each rank
    draws: list[Draw] = []
    winners = []
    for plain in (Draw(0, 1.0, seed=seed) for seed in range(300)):
        winner = int(sample_reference(logits, [plain])[0])
        rank = order.index(winner)
        if rank >= 3 and len(winners) < 6:
            mass = float(before[rank])
            winners.append(winner)
            draws += [plain._replace(top_p=mass + 1e-5), plain._replace(top_k=rank + 1)]
            draws += [plain._replace(top_p=mass - 1e-5), plain._replace(top_k=rank)]
    found = on_device(logits, draws, device)
    assert found == by_engine(logits, draws)
    assert found[0::4] == found[1::4] == winners
    assert not any(token in (found[4 * i + 2], found[4 * i + 3]) for i, token in enumerate(winners))


def test_more_likely_ids_than_the_list_holds(device: torch.device) -> None:
    logits = logits_of(1, LISTED + 2 * BLOCK, 0.5, False)
    draws = [Draw(0, 1.0, top_k=k, top_p=p, seed=k) for k, p in ((0, 0.9), (9000, 1.0), (100, 0.5))]
    assert on_device(logits, draws, device) == by_engine(logits, draws)


def test_a_row_that_lies_in_a_wider_one(device: torch.device) -> None:
    """Only the vocabulary is read: what pads a row may be NaN."""
    wide = torch.full((2, 900), math.nan)
    wide[:, :777] = logits_of(2, 777, 2.0, False)
    draws = [Draw(i, 1.0, seed=i) for i in range(2)]
    packed = torch.from_numpy(pack_draws(draws)).to(device)
    assert sample(wide.to(device)[:, :777], packed).tolist() == by_engine(wide[:, :777], draws)


def test_nothing_to_draw(device: torch.device) -> None:
    packed = torch.from_numpy(pack_draws([])).to(device)
    assert sample(torch.zeros(1, 9, device=device), packed).shape == (0,)

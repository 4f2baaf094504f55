"""`baton bench`: what is sent and when, what the figures mean, and what a failed request does to them."""

import asyncio
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from baton.__main__ import main
from baton.bench.load import closed_loop, open_loop, poisson_times_s
from baton.bench.metrics import parse_slo, percentile, spread, summarize
from baton.bench.prompts import RandomPrompts
from baton.bench.stream import Outcome, Recording
from core.errors import ConfigError
from tests.fake_openai import FakeOpenAI, running

WORDS = [f"Ġ{a}{b}" for a in "abcdefgh" for b in "ijklmnopqrst"]


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """A tokenizer with whole words, each one token, and with pieces of characters that are none by themselves."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id_ for id_, token in enumerate([*letters, *(word[:2] for word in WORDS[::12]), *WORDS])}
    merges = [("Ġ", letter) for letter in "abcdefgh"] + [(word[:2], word[2]) for word in WORDS]
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    return tokenizer


@pytest.fixture
def tokenizer_path(words: Tokenizer, tmp_path: Path) -> str:
    words.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with running(FakeOpenAI()) as server:
        yield server


def outcome(sent_s: float, chunks_s: list[float], tokens: int, error: str = "") -> Outcome:
    return Outcome(sent_s, tuple(chunks_s), 10, tokens, error)


# --- what the figures mean


def test_the_times_of_one_request() -> None:
    one = outcome(1.0, [1.5, 1.6, 1.8, 2.5], tokens=6)  # two chunks held more than one token
    assert one.ttft_s == pytest.approx(0.5)
    assert one.e2e_s == pytest.approx(1.5)
    assert one.tpot_s == pytest.approx(1.0 / 5)
    assert one.itl_s == pytest.approx((0.1, 0.2, 0.7))
    assert outcome(1.0, [1.5], tokens=1).tpot_s == 0.0


def test_percentiles_are_interpolated_as_numpy_does() -> None:
    numpy = pytest.importorskip("numpy")
    values = sorted(random.Random(1).expovariate(1.0) for _ in range(37))
    for share in (0.0, 0.5, 0.9, 0.99, 1.0):
        assert percentile(values, share) == pytest.approx(numpy.percentile(values, share * 100))
    assert spread([]).p99_ms == 0.0


def test_a_summary_counts_failures_apart() -> None:
    outcomes = [outcome(0.0, [0.2, 0.3], 2), outcome(0.0, [0.6, 0.8], 2), outcome(0.0, [], 0, "HTTP 503: busy")]
    summary = summarize(outcomes, 2.0, parse_slo("ttft=500,tpot=150"))
    assert (summary.completed, summary.failed) == (2, 1)
    assert summary.errors == {"HTTP 503: busy": 1}
    assert summary.output_tokens_per_s == 2.0 and summary.total_tokens_per_s == 12.0
    assert summary.ttft.mean_ms == pytest.approx(400)
    assert summary.itl.p50_ms == pytest.approx(150)
    assert summary.goodput_per_s == 0.5  # the second was late with its first token
    assert summarize(outcomes, 2.0).goodput_per_s is None


@pytest.mark.parametrize("text", ["", "ttft", "ttft=", "ttft=-1", "ttft=abc", "speed=3", "ttft=1;tpot=2"])
def test_an_slo_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--slo"):
        parse_slo(text)


# --- what a stream is


def test_chunks_without_text_count_and_usage_gives_the_tokens() -> None:
    recording = Recording(0.0)
    recording.feed(b'data: {"choices": [{"text": "a"}]}\n\ndata: {"cho', 1.0)
    recording.feed(b'ices": [{"text": ""}]}\n\n: ping\n\n', 2.0)
    recording.feed(b'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 9}}\n\n', 3.0)
    recording.feed(b"data: [DONE]\n\n", 4.0)
    assert recording.outcome() == Outcome(0.0, (1.0, 2.0), 5, 9)


def test_the_role_of_a_chat_answer_is_not_its_first_token() -> None:
    recording = Recording(0.0)
    recording.feed(b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n', 1.0)
    recording.feed(b'data: {"choices": [{"delta": {"content": "a"}}]}\n\ndata: [DONE]\n\n', 2.0)
    assert recording.outcome().ttft_s == 2.0


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (b'data: {"choices": [{"text": "a"}]}\n\n', "ended before"),
        (b"data: [DONE]\n\n", "no choice"),
        (b'data: {"choices": [{"text": "a"}]}\n\ndata: {"error": {"message": "lost"}}\n\ndata: [DONE]\n\n', "lost"),
    ],
)
def test_half_an_answer_has_failed(stream: bytes, reason: str) -> None:
    recording = Recording(0.0)
    recording.feed(stream, 1.0)
    assert reason in recording.outcome().error


# --- when requests are sent


async def test_a_closed_loop_keeps_so_many_under_way_and_the_order_of_results() -> None:
    under_way = most = 0

    async def send(item: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (item % 3))
        under_way -= 1
        return item * 10

    assert await closed_loop(send, range(20), 4) == [item * 10 for item in range(20)]
    assert most == 4
    assert await closed_loop(send, [], 4) == []


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    release = asyncio.Event()
    sent: list[int] = []

    async def send(item: int) -> int:
        sent.append(item)
        if len(sent) == 3:
            release.set()
        await release.wait()
        return item

    assert await asyncio.wait_for(open_loop(send, [1, 2, 3], [0.0, 0.001, 0.002]), 5) == [1, 2, 3]


def test_poisson_times_have_the_rate_that_was_asked_for_and_are_replayed_from_a_seed() -> None:
    times = poisson_times_s(4.0, 101, random.Random(3))
    assert times == poisson_times_s(4.0, 101, random.Random(3))
    assert times[0] == 0.0 and times == sorted(times)
    assert times[-1] == pytest.approx(25.0)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert 0.15 < spread(gaps).p50_ms / 1e3 < 0.21  # exponential: ln 2 / 4; an even pace would give 0.25
    assert poisson_times_s(4.0, 1, random.Random(3)) == [0.0]


# --- what is asked


@pytest.mark.parametrize("tokens", [1, 2, 17, 512])
def test_a_prompt_has_the_exact_number_of_tokens(words: Tokenizer, tokens: int) -> None:
    source = RandomPrompts(words, tokens, random.Random(0))
    prompts = [source.draw() for _ in range(5)]
    for prompt in prompts:
        assert words.encode(prompt.text).ids == list(prompt.ids)
        assert len(prompt.ids) == tokens
    assert RandomPrompts(words, tokens, random.Random(0)).draw() == prompts[0]


def test_a_vocabulary_without_words_still_gives_prompts_that_fit() -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: id_ for id_, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompt = RandomPrompts(tokenizer, 100, random.Random(0)).draw()
    assert len(tokenizer.encode(prompt.text).ids) == 100


# --- the command


def bench(server: FakeOpenAI, *flags: str) -> int:
    return main(["bench", "--url", server.url, "--requests", "6", "--input-tokens", "9", *flags])


def test_a_run_against_a_server_with_a_timetable(
    server: FakeOpenAI, tokenizer_path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.first_s, server.gap_s, server.words = 0.10, 0.05, ("a", "b", "c", "d", "e")
    file = tmp_path / "run.json"
    flags = ["--tokenizer", tokenizer_path, "--concurrency", "3", "--slo", "ttft=10000,tpot=5000", "--json", str(file)]
    assert bench(server, *flags, "--ignore-eos", "--output-tokens", "5", "--warmup", "2", "--api-key", "secret") == 0
    assert len(server.seen) == 8 and server.most_busy == 3
    assert server.seen[0] | {"prompt": ""} == {
        "model": "fake-model", "prompt": "", "max_tokens": 5, "temperature": 0.0, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert set(server.keys) == {"Bearer secret"}
    assert len({body["prompt"] for body in server.seen}) == 8
    text = file.read_text()
    summary = json.loads(text)["summary"]
    assert "secret" not in text
    assert (summary["completed"], summary["failed"], summary["output_tokens"]) == (6, 0, 30)
    for name, least_ms in {"ttft": 100, "tpot": 50, "itl": 50, "e2e": 300}.items():
        assert 0.95 * least_ms <= summary[name]["p50_ms"] <= 3 * least_ms  # a busy machine wakes late, never early
    assert summary["goodput_per_s"] == pytest.approx(summary["requests_per_s"])
    assert len(json.loads(text)["requests"]) == 6
    shown = capsys.readouterr().out
    assert "requests completed" in shown and "goodput" in shown and "time per output token" in shown


def test_an_open_loop_run_with_token_ids(server: FakeOpenAI, tokenizer_path: str) -> None:
    assert bench(server, "--tokenizer", tokenizer_path, "--rate", "200", "--prompts", "ids", "--model", "m") == 0
    assert all(len(body["prompt"]) == 9 and isinstance(body["prompt"][0], int) for body in server.seen)
    assert server.seen[0]["model"] == "m" and "ignore_eos" not in server.seen[0]


def test_a_chat_run(server: FakeOpenAI, tokenizer_path: str) -> None:
    assert bench(server, "--tokenizer", tokenizer_path, "--endpoint", "chat") == 0
    assert server.seen[0]["messages"][0]["role"] == "user" and server.seen[0]["max_completion_tokens"] == 64


def test_failed_requests_are_counted_and_shown_and_make_exit_code_1(
    server: FakeOpenAI, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.refuse_every = 3
    assert bench(server, "--tokenizer", tokenizer_path, "--warmup", "0") == 1
    shown = capsys.readouterr().out
    assert "2 requests failed" in shown and "2 x HTTP 503: too busy" in shown


def test_a_stream_that_breaks_off_has_failed(
    server: FakeOpenAI, tokenizer_path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    server.break_after = 1
    assert bench(server, "--tokenizer", tokenizer_path) == 1
    assert "6 requests failed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--tokenizer must name"),
        (["--tokenizer", "no/such/folder"], "no tokenizer.json at no/such/folder"),
        (["--tokenizer", "README.md"], "cannot be read"),
        (["--tokenizer", "models/baton-tiny", "--rate", "0"], "--rate must be above 0"),
        (["--tokenizer", "models/baton-tiny", "--endpoint", "chat", "--prompts", "ids"], "a chat message is text"),
        (["--tokenizer", "models/baton-tiny", "--json", "no/such/run.json"], "no folder no/such"),
        (["--tokenizer", "models/baton-tiny", "--slo", "fast"], "--slo must be like"),
        (["--tokenizer", "models/baton-tiny", "--url", "localhost:1"], "--url must start with"),
        (["--tokenizer", "models/baton-tiny", "--url", "http://127.0.0.1:1"], "no server at http://127.0.0.1:1"),
    ],
)
def test_a_wrong_flag_is_a_clear_message(
    flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert message in capsys.readouterr().err

"""`baton batch`: every line gets its answer or its error, whatever the other lines hold, and however it is stopped."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from baton.__main__ import main
from baton.local_generator import LocalGenerator
from core.errors import EngineError, InvalidRequest
from core.messages import Cancel, Lend, Load, PagesChanged, Submit, WorkerInfo
from core.sampling import SamplingParams
from router.generation import GenerationRequest
from router.tokenizer import LONG_TEXT_CHARS
from session.outlet import Outlet

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "baton-tiny"


def chat(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "baton-tiny", "messages": [{"role": "user", "content": "Repeat: hello"}], **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, **body: Any) -> dict[str, Any]:
    body = {"model": "baton-tiny", "prompt": "import", "max_tokens": 4, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def run(folder: Path, lines: list[dict[str, Any] | str], *flags: str) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and the lines of the output."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    code = main(["batch", str(source), str(target), "--model", str(MODEL), "--threads", "1", *flags])
    return code, [json.loads(line) for line in target.read_text().splitlines()]


def by_id(answers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {answer["custom_id"]: answer for answer in answers}


def test_good_lines_are_answered_in_openais_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [chat(f"chat-{i}", temperature=0, max_tokens=6) for i in range(3)]
    lines += [completion("both", prompt=["import", "def"], n=2, logprobs=1), completion("stop", stop=["e"])]
    code, answers = run(tmp_path, lines)
    assert code == 0
    found = by_id(answers)
    assert set(found) == {line["custom_id"] for line in lines} and len(answers) == len(lines)
    assert len({answer["id"] for answer in answers}) == len(lines)
    for answer in answers:
        assert answer["error"] is None and answer["response"]["status_code"] == 200
        assert answer["response"]["request_id"] in answer["response"]["body"]["id"]
    texts = {found[f"chat-{i}"]["response"]["body"]["choices"][0]["message"]["content"] for i in range(3)}
    assert len(texts) == 1
    assert [choice["index"] for choice in found["both"]["response"]["body"]["choices"]] == [0, 1, 2, 3]
    assert "5 of 5 requests answered, 0 failed" in capsys.readouterr().err


BAD = {
    "not json": (None, "line 2: the body is not JSON"),
    "[1]": (None, "must be a JSON object"),
    json.dumps({"method": "POST"}): (None, "custom_id"),
    json.dumps(completion("good")): ("good", "an earlier line has it too"),
    json.dumps({**completion("a"), "url": "/v1/embeddings"}): ("a", "url: must be /v1/chat/completions or"),
    json.dumps({**completion("a"), "method": "GET"}): ("a", "method"),
    json.dumps({**completion("a"), "body": "x"}): ("a", "body: must be an object"),
    json.dumps(completion("a", stream=True)): ("a", "a batch has no streams"),
    "[" * 100_000: (None, "nested too deeply"),
}


def test_a_line_that_cannot_be_asked_gets_an_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    for line, (custom_id, says) in BAD.items():
        lines = [completion("good"), line, "", completion("after")]
        code, answers = run(tmp_path, lines, "--concurrency", "1")
        assert code == 1
        assert [answer["custom_id"] for answer in answers] == ["good", custom_id, "after"], line
        assert answers[1]["response"] is None and says in answers[1]["error"]["message"]
        assert [answer["error"] is None for answer in answers] == [True, False, True]


def test_a_body_that_is_wrong_gets_the_status_and_error_that_a_server_would_give(tmp_path: Path) -> None:
    wrong = [
        (completion("0", model="other"), 404, "model"),
        (completion("1", temperature=9), 400, "temperature"),
        (chat("2", messages=[]), 400, "messages"),
        (completion("3", prompt="x" * 100_000), 400, "prompt"),
        (chat("4", max_tokens=5000), 400, "max_tokens"),
    ]
    code, answers = run(tmp_path, [line for line, _, _ in wrong] + [completion("good")])
    assert code == 1
    found = by_id(answers)
    for line, status, param in wrong:
        answer = found[line["custom_id"]]
        assert answer["error"] is None and answer["response"]["status_code"] == status
        assert answer["response"]["body"]["error"]["param"] == param
    assert found["good"]["response"]["status_code"] == 200


def test_a_name_for_the_model_and_more_long_lines_than_fit_at_once(tmp_path: Path) -> None:
    text = " " * LONG_TEXT_CHARS  # many characters, few tokens; all encoded on threads
    lines = [completion(str(i), model="m", prompt=f"{text}{i}", max_tokens=2) for i in range(80)]
    code, answers = run(tmp_path, lines, "--served-model-name", "m", "--pages", "300")
    assert code == 0 and set(by_id(answers)) == {str(i) for i in range(80)}


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (["in.jsonl", "out.jsonl", "--model", "nowhere/at/all"], 3, "no such folder"),
        (["missing.jsonl", "out.jsonl", "--model", str(MODEL)], 2, "missing.jsonl: No such file"),
        (["in.jsonl", "in.jsonl", "--model", str(MODEL)], 2, "would replace the input"),
        (["in.jsonl", "no/out.jsonl", "--model", str(MODEL)], 2, "No such file"),
        (["in.jsonl", "out.jsonl", "--model", str(MODEL), "--pages", "3"], 4, "too small"),
        (["in.jsonl", "out.jsonl", "--model", str(MODEL), "--page-size", "20"], 2, "--page-size"),
        (["in.jsonl", "out.jsonl", "--model", str(MODEL), "--max-context", "5000"], 2, "5000"),
        (["in.jsonl", "out.jsonl", "--model", str(MODEL), "--concurrency", "0"], 2, "--concurrency"),
    ],
)
def test_what_keeps_it_from_starting_is_one_line_and_an_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], code: int,
    says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text(json.dumps(completion("a")) + "\n")
    assert main(["batch", *flags]) == code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading")]
    assert len(error) == 1 and says in error[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_it_leaves_whole_lines(tmp_path: Path, number: signal.Signals) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [completion(str(i), max_tokens=2 if i < 5 else 500) for i in range(50)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "baton", "batch", source, target, "--model", MODEL, "--threads", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        give_up_s = time.monotonic() + 60
        while not (target.exists() and target.stat().st_size) and time.monotonic() < give_up_s:
            time.sleep(0.05)
        process.send_signal(number)
        _, error = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "stopped: " in error, error
    assert "Traceback" not in error
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert 0 < len(answers) < 50 and target.read_text().endswith("\n")
    assert all(answer["response"]["status_code"] == 200 for answer in answers)


class SilentTier:
    """Takes requests and says nothing; refuses those for token 0."""

    def __init__(self) -> None:
        self.running: set[str] = set()

    @property
    def info(self) -> WorkerInfo:
        raise NotImplementedError

    def submit(self, submit: Submit) -> None:
        if submit.prompt_ids[0] == 0:
            raise InvalidRequest("no zeros")
        self.running.add(submit.request_id)

    def cancel(self, cancel: Cancel) -> None:
        self.running.discard(cancel.request_id)

    def lend(self, lend: Lend) -> None: ...

    def load(self) -> Load:
        return Load()

    def page_changes(self) -> PagesChanged | None:
        return None

    def page_snapshot(self) -> PagesChanged:
        return PagesChanged(0)

    async def turn(self) -> float:
        return 0.0


async def test_an_engine_that_ends_is_the_error_of_every_request() -> None:
    tier = SilentTier()
    generator = LocalGenerator(tier, Outlet(lambda: 0.0))

    async def ask(name: str, first_id: int = 1) -> None:
        params = SamplingParams(seed=1)
        async for _ in generator.generate(GenerationRequest(name, (first_id,), params, deadline_s=60)):
            pass

    with pytest.raises(InvalidRequest):
        await ask("zero", 0)
    asking = [asyncio.create_task(ask(str(i))) for i in range(3)]
    await asyncio.sleep(0)
    assert len(tier.running) == 3

    async def broken() -> None:
        raise AssertionError("a mistake of ours")

    engine = asyncio.create_task(broken())
    engine.add_done_callback(generator.engine_ended)
    for result in await asyncio.gather(*asking, return_exceptions=True):
        assert isinstance(result, EngineError) and "a mistake of ours" in str(result)
    with pytest.raises(EngineError):
        await ask("later")
    assert not tier.running, "nothing is left behind"

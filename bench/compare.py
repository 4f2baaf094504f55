"""Two OpenAI servers under the same load, in turn: medians of alternating runs, and their ratios.

    python -m bench.compare --vllm PATH/TO/vllm --tokenizer CHECKPOINT \
        --server baton=http://localhost:8000/qwen3 --server vllm=http://localhost:8001/qwen3 --json out.json

The load is that of `vllm bench serve`: random prompts of fixed length, end ids ignored.
A server's model name follows its address. Servers that are idle meanwhile stay up: what they hold is the same in every
run. Each run has a seed of its own, so that no prompt is in a prefix cache already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

FIGURES = {  # what `vllm bench serve` calls it -> what the table calls it
    "output_throughput": "output tok/s",
    "median_ttft_ms": "median TTFT ms",
    "p99_ttft_ms": "P99 TTFT ms",
    "median_tpot_ms": "median TPOT ms",
    "median_itl_ms": "median ITL ms",
    "p99_itl_ms": "P99 ITL ms",
}


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    url: str
    model: str

    @classmethod
    def parse(cls, text: str) -> Server:
        name, _, address = text.partition("=")
        url, _, model = address.rpartition("/")
        return cls(name, url, model)


def measure(server: Server, args: argparse.Namespace, seed: int) -> dict[str, float]:
    """One run of the client. Raises CalledProcessError with what it printed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            args.vllm, "bench", "serve", "--backend", "openai", "--base-url", server.url,
            "--model", args.tokenizer, "--served-model-name", server.model, "--dataset-name", "random",
            "--random-input-len", str(args.input_tokens), "--random-output-len", str(args.output_tokens),
            "--num-prompts", str(args.requests), "--max-concurrency", str(args.concurrency), "--ignore-eos",
            "--seed", str(seed), "--percentile-metrics", "ttft,tpot,itl,e2el", "--save-result",
            "--result-dir", folder, "--result-filename", "result.json",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        result = json.loads((Path(folder) / "result.json").read_text())
    assert result["completed"] == args.requests, f"{server.name}: {result['completed']} of {args.requests} completed"
    return {figure: float(result[figure]) for figure in FIGURES}


def table(servers: list[Server], runs: dict[str, list[dict[str, float]]]) -> str:
    """A row per figure: each server's median, and the first over each other."""
    first, *others = servers
    ratios = [f"{first.name} / {other.name}" for other in others]
    lines = ["| figure | " + " | ".join([*(s.name for s in servers), *ratios]) + " |"]
    lines.append("|---" * (1 + len(servers) + len(others)) + "|")
    for figure, title in FIGURES.items():
        medians = {s.name: statistics.median(run[figure] for run in runs[s.name]) for s in servers}
        cells = [f"{medians[s.name]:,.1f}" for s in servers]
        cells += [f"{medians[first.name] / medians[other.name]:.2f}" for other in others]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="the vllm command, for its benchmark client")
    parser.add_argument("--tokenizer", required=True, help="checkpoint folder whose tokenizer makes the prompts")
    parser.add_argument("--server", action="append", required=True, metavar="NAME=URL/MODEL", help="the first is ours")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--requests", type=int, default=24, help="of each run")
    parser.add_argument("--input-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="alternating runs of each server")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where every run's figures go")
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    servers = [Server.parse(text) for text in args.server]
    runs: dict[str, list[dict[str, float]]] = {server.name: [] for server in servers}
    for number in range(args.rounds):
        for server in servers:
            run = measure(server, args, args.seed + number)
            runs[server.name].append(run)
            print(f"round {number + 1} {server.name}: {run['output_throughput']:.1f} tok/s", file=sys.stderr)
    print(table(servers, runs))
    if args.json:
        args.json.write_text(json.dumps(runs, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

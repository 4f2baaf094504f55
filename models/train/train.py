"""Train the model; can be stopped and started again.

Usage: python train.py MODEL_DIR WORK_DIR --minutes 100
The work folder keeps the tokenised corpus, the training state and the log; MODEL_DIR gets the exported
weights at the end and every --export minutes into WORK_DIR/export.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import time

import safetensors.torch
import tokenizers
import torch
from torch import Tensor
from torch.nn import functional

import data
from model import Model, Shape, export
from muon import Optimizer

WEIGHTS = {"code": 0.5, "recall": 1.0, "repeat": 0.4, "sum": 0.3, "complete": 0.1}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A part of the run: it lasts until a share of the run is over."""

    until: float
    length: int
    rows: int
    mixture: list[float]


CURRICULUM = (
    Stage(0.35, 128, 32, [0.25, 0.40, 0.30, 0.02, 0.03]),
    Stage(0.545, 256, 16, [0.30, 0.40, 0.20, 0.05, 0.05]),
    Stage(0.677, 512, 8, [0.40, 0.35, 0.13, 0.06, 0.06]),
    Stage(0.755, 1024, 6, [0.45, 0.32, 0.10, 0.07, 0.06]),
    Stage(0.81, 1024, 6, [0.38, 0.30, 0.20, 0.06, 0.06]),
    Stage(1.01, 2048, 3, [0.38, 0.30, 0.20, 0.06, 0.06]),
)


def rate_at(progress: float, step: int, warmup: int = 100, decay: float = 0.22) -> float:
    """Warm-up, a stable part, and a linear decay over the last part of the run."""
    return min(1.0, (step + 1) / warmup, max(0.02, (1 - progress) / decay))


def kind_losses(model: Model, hidden: Tensor, targets: Tensor, kinds: Tensor) -> tuple[Tensor, dict[str, list[float]]]:
    """The weighted loss and, by kind, its mean and the share of right tokens."""
    keep = targets != data.IGNORED
    logits = hidden[keep] @ model.embed_tokens.weight.T
    wanted, owner = targets[keep], kinds[:, None].expand_as(targets)[keep]
    losses = functional.cross_entropy(logits.float(), wanted, reduction="none")
    right = (logits.detach().argmax(-1) == wanted).float()
    total, report = torch.zeros(()), {}
    for index, kind in enumerate(data.KINDS):
        mine = owner == index
        if mine.any():
            mean = losses[mine].mean()
            total = total + WEIGHTS[kind] * mean
            report[kind] = [float(mean.detach()), float(right[mine].mean())]
    return total, report


class Run:
    """A training run with its state."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Start afresh, or from the state in the work folder."""
        self.options, self.work = options, pathlib.Path(options.work)
        folder = pathlib.Path(options.model)
        torch.manual_seed(options.seed)
        torch.set_num_threads(options.threads)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.rows = data.Rows(self.work, tokenizer, options.seed)
        self.model = Model(Shape.load(folder))
        self.optimizer = Optimizer(self.model)
        self.model.bfloat16()
        self.compiled = torch.compile(self.model, dynamic=False) if options.compile else self.model
        self.step, self.elapsed, self.tokens = 0, 0.0, 0
        self.means: dict[str, list[float]] = {}
        if (self.work / "state.json").exists():
            self._load()

    def _load(self) -> None:
        """Take up the saved state."""
        saved = json.loads((self.work / "state.json").read_text(encoding="utf-8"))
        self.step, self.elapsed, self.tokens = saved["step"], saved["elapsed"], saved["tokens"]
        self.optimizer.load(safetensors.torch.load_file(str(self.work / saved["file"])))

    def save(self) -> None:
        """Save the state and the exported weights; the state file changes last."""
        name = f"state-{self.step % 2}-{self.step}.safetensors"
        safetensors.torch.save_file(self.optimizer.state, str(self.work / name))
        state = {"step": self.step, "elapsed": self.elapsed, "tokens": self.tokens, "file": name}
        (self.work / "state.json.new").write_text(json.dumps(state), encoding="utf-8")
        (self.work / "state.json.new").replace(self.work / "state.json")
        for old in self.work.glob("state-*.safetensors"):
            if old.name != name:
                old.unlink()
        (self.work / "export").mkdir(exist_ok=True)
        export(self.model, self.work / "export")

    def progress(self) -> float:
        """The share of the run that is over, by time or by steps, whichever is further."""
        return float(max(self.elapsed / (self.options.minutes * 60), self.step / self.options.steps))

    def advance(self) -> None:
        """One optimizer step."""
        progress = self.progress()
        stage = next(stage for stage in CURRICULUM if progress < stage.until)
        inputs, targets, kinds = self.rows.batch(self.step, stage.length, stage.rows, stage.mixture)
        loss, report = kind_losses(self.model, self.compiled(inputs), targets, kinds)
        loss.backward()
        rate = rate_at(progress, self.step)
        self.optimizer.step(self.options.rate * rate, self.options.rest_rate * rate, self.step)
        self.step, self.tokens = self.step + 1, self.tokens + inputs.numel()
        for kind, values in report.items():
            old = self.means.get(kind, values)
            self.means[kind] = [0.95 * a + 0.05 * b for a, b in zip(old, values, strict=True)]

    def log(self) -> None:
        """Print one line on the state of the run."""
        parts = [f"{kind} {loss:.3f}/{right:.3f}" for kind, (loss, right) in sorted(self.means.items())]
        done = f"step {self.step} {self.elapsed / 60:.1f} min {self.tokens / 1e6:.2f} Mtok"
        print(done, *parts, flush=True)

    def train(self) -> None:
        """Train until the time or the steps are over."""
        saved = time.monotonic()
        while self.progress() < 1:
            begun = time.monotonic()
            self.advance()
            self.elapsed += time.monotonic() - begun
            if self.step % 50 == 0:
                self.log()
            if time.monotonic() - saved > self.options.export * 60:
                self.save()
                saved = time.monotonic()
        self.save()
        export(self.model, pathlib.Path(self.options.model))


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("work")
    parser.add_argument("--minutes", type=float, default=100.0)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--export", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--rest-rate", type=float, default=0.004)
    parser.add_argument("--compile", action="store_true")
    Run(parser.parse_args()).train()


if __name__ == "__main__":
    main()

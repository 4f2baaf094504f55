"""Which command runs: the table of subcommands, what --help shows, and how an error becomes an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import baton
from core.errors import BatonError, StartupError

EXIT_USAGE = 2
EXIT_INTERRUPTED = 130  # what shells report for a process that SIGINT ended
EXIT_PIPE_CLOSED = 141  # the same for SIGPIPE: whoever read the output has left


class Subcommand(Protocol):
    """What a subcommand's module has. `run` returns the exit code, and raises BatonError for the user to read."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


class Help(argparse.HelpFormatter):
    """Adds the default to the help of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.help is None or action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"


@dataclass(frozen=True, slots=True)
class Command:
    """A row of the table. The module is imported only when its command runs, so that --help is instant."""

    name: str
    module: str
    summary: str
    hidden: bool = False  # started by the launcher, not by people


COMMANDS = (
    Command("serve", "baton.serve", "serve a model on this machine: a router, prefill and decode workers"),
    Command("chat", "baton.chat", "talk to a running server in the terminal"),
    Command("batch", "baton.offline", "answer a file of requests (OpenAI batch format) without a server"),
    Command("bench", "baton.bench.command", "load a running server and measure latency and throughput"),
    Command("status", "baton.status", "one page on a running cluster: tiers, workers, hand-offs, what is wrong"),
    Command("top", "baton.top", "the same, live in the terminal"),
    Command("deploy", "baton.cluster.deploy", "bring a cluster file onto a running Ray cluster, or change it there"),
    Command("undeploy", "baton.cluster.undeploy", "take it down again; workers finish what they have"),
    Command("doctor", "baton.doctor", "prove and measure every path between the workers of a running server"),
    Command("k8s", "baton.k8s.command", "look at a Kubernetes cluster, and say what is wrong with it for Baton"),
    Command("tune", "baton.tune", "measure the GPU kernels' configurations on this GPU, for serving to use"),
    Command("worker", "baton.worker", "one worker process", hidden=True),
    Command("router", "baton.router_process", "one router process", hidden=True),
)

EXAMPLES = """\
examples:
  baton serve models/baton-tiny                   serve the model that comes with Baton on port 8000
  baton serve PATH_OR_HF_ID --prefill 2 --decode 2
  baton chat
  baton bench --concurrency 8 --requests 64 --tokenizer models/baton-tiny

`baton COMMAND --help` tells the rest."""


def usage() -> str:
    """What `baton --help` prints."""
    rows = [f"  {command.name:9s} {command.summary}" for command in COMMANDS if not command.hidden]
    rows.append(f"  {'version':9s} print the version")
    return "\n".join(["usage: baton COMMAND [options]", "", "commands:", *rows, "", EXAMPLES])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script. Output that nobody reads any more ends it quietly, as it ends other tools."""
    try:
        code = dispatch((sys.argv[1:] if argv is None else list(argv)) or ["--help"])
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit fails once more
        return EXIT_PIPE_CLOSED


def dispatch(argv: Sequence[str]) -> int:
    """Runs what the first word names."""
    name, *rest = argv
    if name in ("-h", "--help", "help"):
        print(usage())
        return 0
    if name in ("-V", "--version", "version"):
        print(f"baton {baton.__version__}")
        return 0
    command = next((command for command in COMMANDS if command.name == name), None)
    if command is None:
        print(f"baton: no command {name!r}\n\n{usage()}", file=sys.stderr)
        return EXIT_USAGE
    return run_command(command, rest)


def run_command(command: Command, argv: Sequence[str]) -> int:
    """Imports, parses, runs. An error that a user can act on is one line on stderr; any other keeps its traceback."""
    module = cast(Subcommand, importlib.import_module(command.module))
    parser = argparse.ArgumentParser(
        prog=f"baton {command.name}",
        description=command.summary[:1].upper() + command.summary[1:] + ".",
        formatter_class=Help,
    )
    module.add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return module.run(args)
    except BatonError as error:
        print(f"baton {command.name}: {error.message}", file=sys.stderr)
        return error.exit_code if isinstance(error, StartupError) else 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())

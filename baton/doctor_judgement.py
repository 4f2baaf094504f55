"""What is wrong with the paths between workers, in words, and what to do next. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median

from router.path_survey import PairPath, PathReply

SLOW = 5.0  # times slower than the median of its transport
FEW = 3  # fewer paths of a transport than this have no median worth the name
NOTICEABLE_S = 0.001  # a latency below this is never slow

ADVICE = (  # what the trouble says, and what helps; the first that fits
    ("no session", "see that one reaches the other's address (its --listen or --advertise) through firewalls"),
    ("other bytes", "do not use this path: bytes change on the way. Look for failing memory, network card or cable"),
    ("ticket", "give the doctor the workers' --ticket-key-file, or ask a router with --url, which has it"),
    ("did not tell", "see the worker's log; it may have ended, or be of an older version"),
    (
        "network namespaces",
        "run both in one network namespace (one pod, or containers with the host's network), or accept UCX for such "
        "pairs with --expect-transport ucx",
    ),
    ("different users", "start both workers as the same user: memory is shared between processes of one user alone"),
    (
        "lie in",  # of pools: one in a GPU's memory, one in the host's
        "give both tiers the same --device, so that they can share memory on one machine, or both UCX: --transport "
        "auto or ucx, and the extra `ucx` with CUDA where the GPU is",
    ),
    ("different machines", "place the two on one machine, or give the workers UCX: --transport auto or ucx"),
    ("expected ucx over", "see what UCX finds (`ucx_info -d`), and the workers' --ucx-tls and --ucx-net-devices"),
    ("does not have it", "start both workers with the same --transport, and install the extra `ucx` on both"),
    ("", "see the receiver's log for when it failed and why"),
)
TCP = "runs over TCP alone"
TCP_ADVICE = (
    "on one machine use --transport auto; between machines with RDMA name its devices with --ucx-net-devices, and have "
    "it checked with --expect-transport ucx:rc"
)
SLOW_ADVICE = "compare the network, the load and the CPU of these two hosts with those of the others"


@dataclass(frozen=True, slots=True)
class Finding:
    """`wrong`: it costs requests or time; else it is a hint."""

    wrong: bool
    where: tuple[str, ...]  # "source -> receiver", or a worker
    what: str
    advice: str


def judge(reply: PathReply) -> list[Finding]:
    """The worst first; what several paths have in common is said once."""
    found = [
        *(Finding(True, (name,), "does not answer", "see that it runs, and its address") for name in reply.missing),
        *(_broken(row) for row in reply.pairs if _is_broken(row)),
        *_outliers(reply.pairs),
        *(Finding(False, (_name(row),), TCP, TCP_ADVICE) for row in reply.pairs if _is_tcp_alone(row)),
    ]
    if not reply.pairs and not reply.missing:
        advice = "nothing is handed off: aggregated workers need no path"
        found.append(Finding(False, (), "there is no pair of a prefill and a decode worker", advice))
    return merged(found)


def _name(row: PairPath) -> str:
    return f"{row.source} -> {row.receiver}"


def _is_broken(row: PairPath) -> bool:
    return bool(row.trouble) or (row.needed and not row.transport)


def _broken(row: PairPath) -> Finding:
    what = row.trouble or "no path was proved"
    advice = next(advice for words, advice in ADVICE if words in what)
    return Finding(True, (_name(row),), what, advice)


def _is_tcp_alone(row: PairPath) -> bool:
    lanes = row.lanes.split(", ")
    return row.transport == "ucx" and all(lane.startswith("tcp") for lane in lanes)


def _outliers(rows: Sequence[PairPath]) -> Iterable[Finding]:
    """Paths that are slower than others of their transport."""
    by_transport: dict[str, list[PairPath]] = defaultdict(list)
    for row in rows:
        if row.transport:
            by_transport[row.transport].append(row)
    for transport, alike in by_transport.items():
        if len(alike) < FEW:
            continue
        rate, latency_s = median(row.bytes_per_s for row in alike), median(row.latency_s for row in alike)
        for row in alike:
            if row.bytes_per_s * SLOW < rate:
                slower = f"{rate / max(row.bytes_per_s, 1.0):.0f} times slower than the median of the {transport} paths"
                yield Finding(True, (_name(row),), slower, SLOW_ADVICE)
            elif row.latency_s > max(SLOW * latency_s, NOTICEABLE_S):
                later = f"{row.latency_s / latency_s:.0f} times the median latency of the {transport} paths"
                yield Finding(True, (_name(row),), later, SLOW_ADVICE)


def merged(found: Sequence[Finding]) -> list[Finding]:
    """What several have in common is said once."""
    alike: dict[tuple[bool, str, str], list[str]] = defaultdict(list)
    for finding in found:
        alike[finding.wrong, finding.what, finding.advice].extend(finding.where)
    return [Finding(wrong, tuple(where), what, advice) for (wrong, what, advice), where in alike.items()]

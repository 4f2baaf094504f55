"""Which fields of a body belong to the server alone: a client that could set them would choose peers, pages or code.

Peers and their addresses come from the registry, permissions from tickets, and neither from anything that a client
sends. Headers of that kind need no list: none is ever passed on to a worker.
"""

from __future__ import annotations

from router.validation import Fields, refuse

NAMES = (
    "chat_template", "disaggregated_params", "dp_rank", "ec_transfer_params", "input_embeds", "nvext", "prompt_embeds",
    "routed_dp_rank",
)  # fmt: skip
PREFIXES = ("bootstrap_", "data_parallel_", "disagg_", "do_remote_", "kv_transfer_", "remote_")
NESTS = ("extra_args", "extra_body", "vllm_xargs")  # where clients put what their library does not know
MAX_DEPTH = 8


def refuse_internal(fields: Fields) -> None:
    """Raises InvalidRequest, naming the field, at the top of a body and within the objects that carry more of them."""
    for name in fields:
        _check_name(fields, name)
        if name in NESTS:
            _check_within(fields, name, MAX_DEPTH)


def _check_name(fields: Fields, name: str) -> None:
    if name in NAMES or name.startswith(PREFIXES):
        refuse(fields.param(name), "is not accepted from clients")


def _check_within(fields: Fields, name: str, depth: int) -> None:
    """An object in there may hold them as well; lists are nothing that names a field."""
    child = fields.child(name) if type(fields.raw(name)) is dict else None
    if child is None:
        return
    if not depth:
        refuse(fields.param(name), "is nested too deeply")
    for inner in child:
        _check_name(child, inner)
        _check_within(child, inner, depth - 1)

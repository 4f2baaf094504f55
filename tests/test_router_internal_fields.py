"""Clients choose no peers: fields of that kind are refused wherever they hide, and headers reach nobody."""

from __future__ import annotations

from typing import Any

import pytest
from router_front import chat, completion, error_of, front, in_process, say, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PATHS = {"/v1/chat/completions": chat, "/v1/completions": completion}

FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"kv_transfer_params": {"remote_host": "10.0.0.1"}}, "kv_transfer_params"),
    ({"kv_transfer_config": {}}, "kv_transfer_config"),
    ({"ec_transfer_params": {}}, "ec_transfer_params"),
    ({"disaggregated_params": {"request_type": "context_only"}}, "disaggregated_params"),
    ({"disagg_prefill_dp_rank": 0}, "disagg_prefill_dp_rank"),
    ({"bootstrap_host": "10.0.0.1"}, "bootstrap_host"),
    ({"bootstrap_port": [8998]}, "bootstrap_port"),
    ({"bootstrap_room": 0}, "bootstrap_room"),
    ({"do_remote_prefill": False}, "do_remote_prefill"),
    ({"do_remote_decode": True}, "do_remote_decode"),
    ({"remote_block_ids": [1]}, "remote_block_ids"),
    ({"remote_engine_id": "x"}, "remote_engine_id"),
    ({"data_parallel_rank": 1}, "data_parallel_rank"),
    ({"routed_dp_rank": 1}, "routed_dp_rank"),
    ({"nvext": {"backend_instance_id": 1}}, "nvext"),
    ({"nvext": 5}, "nvext"),
    ({"extra_body": {"kv_transfer_params": {}}}, "extra_body.kv_transfer_params"),
    ({"extra_body": {"nvext": {"remote_host": "x"}}}, "extra_body.nvext"),
    ({"extra_body": {"a": {"b": {"bootstrap_host": 1}}}}, "extra_body.a.b.bootstrap_host"),
    ({"vllm_xargs": {"remote_host": "x"}}, "vllm_xargs.remote_host"),
    ({"extra_args": {"data_parallel_rank": 1}}, "extra_args.data_parallel_rank"),
]
DEEP: dict[str, Any] = {}
for _ in range(400):
    DEEP = {"x": DEEP}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("fields", "param"), FIELDS, ids=[param for _, param in FIELDS])
async def test_a_field_of_the_servers_own_is_refused_by_name(path: str, fields: dict[str, Any], param: str) -> None:
    generator = say(TOKENIZER, "fine")
    async with in_process(front(TOKENIZER, generator)) as client:
        response = await client.post(path, json=PATHS[path]() | fields)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert generator.requests == [], "it reached the generator"


async def test_what_nests_without_end_is_refused() -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, "fine"))) as client:
        response = await client.post("/v1/completions", json=completion() | {"extra_body": DEEP})
    assert response.status_code == 400 and error_of(response)["param"].startswith("extra_body.x.x")


@pytest.mark.parametrize("value", [None, 5, [], {}, {"metadata": {"a": "b"}}, {"top_k": 1}])
async def test_what_is_harmless_there_is_let_through(value: object) -> None:
    async with in_process(front(TOKENIZER, say(TOKENIZER, "fine"))) as client:
        response = await client.post("/v1/completions", json=completion() | {"extra_body": value})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "header",
    [
        "x-prefiller-host-port", "x-prefill-host-port", "x-data-parallel-rank", "x-data-parallel-host-port",
        "x-bootstrap-host", "x-gateway-destination-endpoint", "x-worker-instance-id", "x-kv-transfer-params",
    ],
)  # fmt: skip
async def test_a_header_that_names_a_peer_changes_nothing(header: str) -> None:
    """What the workers are given is made from the request below, and it is the same with and without the header."""
    asked = []
    for headers in ({}, {header: "10.6.6.6:9000"}):
        generator = say(TOKENIZER, "fine")
        async with in_process(front(TOKENIZER, generator)) as client:
            response = await client.post("/v1/chat/completions", json=chat(seed=1), headers=headers)
        assert response.status_code == 200, response.text
        (request,) = generator.requests
        asked.append((request.prompt_ids, request.params, request.salt, request.priority))
        assert "10.6.6.6" not in repr(request)
    assert asked[0] == asked[1]

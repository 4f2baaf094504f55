"""What a cluster file may say, and what becomes of it: command lines, placement, versions. Without a Ray cluster."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.cluster.command_lines import Place, router_options, worker_options
from baton.cluster.deploy import with_whole_path
from baton.cluster.placement import actor_options, options_of, version_of
from baton.cluster.spec import ClusterSpec, load, parse
from baton.scaling.prefill import PrefillTarget
from core.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PLAIN: dict[str, Any] = {
    "model": {"path": "models/baton-tiny"},
    "registry": {"url": "redis://127.0.0.1/0"},
    "security": {"insecure": True},
}
HERE = Place("10.0.0.7", {"ray.io/node-id": "n1", "ray.io/availability-zone": "a", "rack": "7", "ray.io/x": "y"})


def spec(**parts: Any) -> ClusterSpec:
    return parse({**PLAIN, **parts})


def test_the_least_that_is_needed_gives_the_documented_rest() -> None:
    plain = spec()
    assert (plain.router.http_port, plain.router.drain_s, plain.router.max) == (8000, 30.0, 1)
    assert (plain.prefill.max, plain.prefill.drain_s, plain.prefill.target) == (4, 120.0, PrefillTarget())
    assert (plain.decode.max, plain.decode.drain_s) == (4, 900.0)
    assert plain.registry.prefix == "baton"


def test_the_example_is_a_cluster_file() -> None:
    path = ROOT / "deploy" / "cluster.yaml"
    plain = load(path)
    tiers = yaml.safe_load(path.read_text())
    assert {"router", "prefill", "decode"} <= set(tiers) and parse(plain) == parse(tiers)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"extra": 1}, "extra: there is no such key"),
        ({"prefill": {"mim": 1}}, "prefill.mim: there is no such key; did you mean min?"),
        ({"prefill": {"target": {"first_token_s": "2"}}}, "prefill.target.first_token_s must be a number, got '2'"),
        ({"prefill": {"target": {"token_gap_s": 1}}}, "prefill.target.token_gap_s: there is no such key"),
        ({"decode": {"min": True}}, "decode.min must be a whole number, got True"),
        ({"decode": {"min": 5}}, "decode: 1 <= min <= max"),
        ({"decode": {"num_gpus": -1}}, "decode: num_gpus must not be negative"),
        ({"decode": {"resources": {"rdma": "1"}}}, "decode.resources.rdma must be a number"),
        ({"decode": {"flags": {"page_size": "16"}}}, "decode: flags.page_size must be int"),
        ({"decode": {"flags": {"page_sise": 16}}}, "decode: flags.page_sise: there is no such option"),
        ({"decode": {"flags": {"listen": "0.0.0.0:1"}}}, "decode: flags.listen: other keys"),
        ({"decode": {"flags": {"transport": "carrier-pigeon"}}}, "decode: flags.transport must be one of auto"),
        ({"router": [1]}, "router must be keys with values"),
        ({"router": {"http_port": 70000}}, "router: http_port must be from 0 to 65535"),
        ({"router": {"flags": {"pages": 1}}}, "router: flags.pages: there is no such option"),
        ({"model": {}}, "model.path is missing"),
        ({"registry": {}}, "registry: one of url and url_file is needed"),
        ({"security": {}}, "security: ticket_key_file is missing"),
        ({"security": {"insecure": True, "tls_cert": "a"}}, "security: TLS takes all of"),
    ],
)
def test_what_is_wrong_is_refused_by_its_path(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match="^" + words.replace("?", "\\?")):
        spec(**parts)


@pytest.mark.parametrize("text", ["", "a: [", "- 1", "model: {path: x}"])
def test_a_file_that_is_none_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml"):
        load(tmp_path / "c.yaml")
    with pytest.raises(ConfigError, match=r"other\.yaml"):
        load(tmp_path / "other.yaml")


def test_an_address_with_a_secret_is_read_where_it_is_needed(tmp_path: Path) -> None:
    (tmp_path / "url").write_text("rediss://:word@host/0\n")
    at = spec(registry={"url_file": str(tmp_path / "url")}).registry
    assert at.address() == "rediss://:word@host/0" and "word" not in str(asdict(at))
    with pytest.raises(ConfigError, match="url_file"):
        spec(registry={"url_file": str(tmp_path / "none")}).registry.address()


def test_a_worker_gets_its_place_and_its_tier() -> None:
    whole = spec(
        decode={"num_cpus": 3, "drain_s": 7, "flags": {"page_size": 32, "labels": "rack=8"}},
        security={
            "ticket_key_file": "/key",
            "tls_cert": "/tls/{role}.crt",
            "tls_key": "/tls/{role}.key",
            "tls_ca": "/ca",
        },
    )
    options = worker_options(whole, "decode", "decode-abc", Path("/m/tiny"), HERE)
    assert (options.name, options.role, options.listen, options.drain_s) == ("decode-abc", "decode", "10.0.0.7:0", 7.0)
    assert (options.registry, options.page_size, options.threads, options.served_name) == (
        "redis://127.0.0.1/0", 32, 3, "tiny",
    )  # fmt: skip
    assert options.labels == "rack=8,zone=a,node=n1"
    assert (options.tls_cert, options.tls_key, options.tls_ca) == ("/tls/decode.crt", "/tls/decode.key", "/ca")
    router = router_options(whole, "router-abc", Path("/m/tiny"))
    assert (router.port, router.tls_cert, router.registry_prefix) == (8000, "/tls/router.crt", "baton")


def test_placement_prefers_and_does_not_insist() -> None:
    place = {"label_selector": {"gpu": "H200"}, "prefer": {"fabric": "f1"}, "resources": {"ib": 1}}
    whole = spec(decode={"num_gpus": 2, **place})
    options = actor_options(whole.decode)
    assert (options["num_gpus"], options["resources"]) == (2.0, {"ib": 1.0})
    assert options["label_selector"] == {"gpu": "H200", "fabric": "f1"}
    assert options["fallback_strategy"] == [{"label_selector": {"gpu": "H200"}}]
    assert "label_selector" not in actor_options(whole.prefill)


def test_deadlines_are_in_order_and_two_routers_never_share_a_port() -> None:
    whole = spec()
    for name, tier in (("router", whole.router), ("prefill", whole.prefill), ("decode", whole.decode)):
        options = options_of(whole, name)
        assert options["graceful_shutdown_timeout_s"] > tier.drain_s + 10.0
        assert options["autoscaling_config"]["look_back_period_s"] <= 2.0
    assert options_of(whole, "router")["max_replicas_per_node"] == 1
    assert "max_replicas_per_node" not in options_of(spec(router={"http_port": 0}), "router")


def test_only_what_a_process_is_started_with_restarts_it() -> None:
    def versions(**parts: Any) -> list[str]:
        return [version_of(spec(**parts), tier) for tier in ("router", "prefill", "decode")]

    before = versions()
    assert versions(decode={"max": 7, "target": {"token_gap_s": 1}}) == before
    changed = versions(decode={"flags": {"page_size": 32}})
    assert changed[:2] == before[:2] and changed[2] != before[2]
    assert not set(versions(model={"path": "other"})) & set(before)


def test_a_folder_is_looked_for_where_the_command_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    assert with_whole_path({"model": {"path": "tiny", "served_name": "t"}})["model"] == {
        "path": str(tmp_path / "tiny"), "served_name": "t",
    }  # fmt: skip
    assert with_whole_path({"model": {"path": "org/model"}})["model"]["path"] == "org/model"

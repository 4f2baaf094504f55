"""What a start takes from the table of tuned configurations, and what it makes of a table that does not fit."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from baton import loaded_model, tuned_table
from baton.backends import Backend
from baton.loaded_model import PoolWish, load
from baton.tuned_table import attention_configs, default_file, table_for
from core.errors import ConfigError, EngineError, StartupError
from engine import device_pool
from engine.attention_configs import AttentionConfigs
from engine.config import ModelConfig, read_config
from kernels.gpu.decode_attention import DecodeConfig, default_config
from kernels.gpu.prefill_attention import PrefillConfig
from kernels.gpu.tuning import EMPTY, Config
from tests.tiny_models import save_tiny

CHIP = "NVIDIA H200"
SOFTWARE = {"torch": "2.13", "triton": "3.9"}
DECODE: Config = {"block_keys": 32, "num_warps": 8, "num_stages": 2, "splits": None, "assembly": True}
PREFILL: Config = {
    "block_m": 64, "block_n": 32, "num_warps": 4, "num_stages": 2, "descriptors": True, "warp_specialize": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(save_tiny("llama3", tmp_path_factory.mktemp("model")))


def shapes(model: ModelConfig) -> tuple[str, str]:
    """Of decode with 9 to 64 rows, and of prefill."""
    heads = f"bfloat16 bfloat16 H{model.heads} K{model.kv_heads} D{model.head_dim} P16"
    return f"{heads} M1 R64", heads


def configs(model: ModelConfig, decode: Config | None = None, prefill: Config | None = None) -> AttentionConfigs:
    given = zip(("decode_attention", "prefill_attention"), shapes(model), (decode, prefill), strict=True)
    table = {(kernel, shape): config for kernel, shape, config in given if config is not None}
    return AttentionConfigs(model, 16, torch.bfloat16, table)


def test_each_class_of_batches_has_its_own(model: ModelConfig) -> None:
    found = configs(model, DECODE, PREFILL)
    default = default_config(model.head_dim, 2, model.heads // model.kv_heads)
    tuned = DecodeConfig(block_keys=32, num_warps=8, num_stages=2)
    wanted = [default, default, tuned, tuned, default]
    assert default != tuned and [found.decode(rows) for rows in (1, 8, 9, 64, 65)] == wanted
    assert found.prefill == PrefillConfig(64, 32, 4, 2, descriptors=True)
    assert len(found.tuned) == 5 and sum(found.tuned.values()) == 2


def test_the_fields_of_another_release_are_not_used(model: ModelConfig) -> None:
    found = configs(model, {**DECODE, "block_dim": 32}, {"block_m": 64})
    plain = AttentionConfigs(model, 16, torch.bfloat16, EMPTY)
    assert found.decode(64) == plain.decode(64) and found.prefill == plain.prefill
    assert not any(found.tuned.values())


@pytest.mark.parametrize(
    ("decode", "prefill"),
    [
        ({**DECODE, "block_keys": 48}, None), ({**DECODE, "block_keys": 8}, None), ({**DECODE, "num_warps": "4"}, None),
        ({**DECODE, "num_stages": 0}, None), ({**DECODE, "num_stages": None}, None), ({**DECODE, "assembly": 1}, None),
        ({**DECODE, "splits": True}, None), (None, {**PREFILL, "num_warps": 3}),
    ],
)  # fmt: skip
def test_what_no_kernel_can_run_with_is_refused(
    model: ModelConfig, decode: Config | None, prefill: Config | None
) -> None:
    with pytest.raises(ValueError, match="no kernel can run with"):
        configs(model, decode, prefill)


def with_file(chip: str, entries: Mapping[str, object], software: Mapping[str, str] = SOFTWARE) -> Path:
    """At the place where `baton tune` puts it."""
    path = default_file(chip)
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {"kernel": "decode_attention", "shape": shape, "done": True, "trials": [{"config": config, "time_us": 1.0}]}
        for shape, config in entries.items()
    ]
    path.write_text(json.dumps({"version": 1, "chip": chip, "software": dict(software), "entries": listed}))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_users_file_is_where_tuning_puts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert table_for(CHIP, SOFTWARE, tmp_path) == {}
    path = with_file(CHIP, {"s": DECODE})
    assert tmp_path in path.parents and table_for(CHIP, SOFTWARE, tmp_path) == {("decode_attention", "s"): DECODE}
    assert table_for(CHIP, {**SOFTWARE, "triton": "4.0"}, tmp_path) == {} and "not used" in caplog.text
    path.write_text('{"version": 1')
    with pytest.raises(ConfigError, match=r"nvidia-h200\.json.*remove the file"):
        table_for(CHIP, SOFTWARE, tmp_path)


def test_a_start_says_once_what_is_tuned(
    model: ModelConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuned_table, "_chip", lambda backend: CHIP)
    decode, prefill = shapes(model)
    with_file(CHIP, {decode: DECODE}, tuned_table.installed())
    caplog.set_level(logging.INFO)
    assert attention_configs(Backend("triton", "cuda"), model, 16, torch.bfloat16).decode(64).num_warps == 8
    assert f"decode_attention {decode}: tuned" in caplog.text and len(caplog.records) == 5
    assert f"prefill_attention {prefill}: untuned: defaults" in caplog.text
    path = with_file(CHIP, {decode: {**DECODE, "num_warps": 3}}, tuned_table.installed())
    with pytest.raises(ConfigError, match=f"{path.name}.*num_warps 3"):
        attention_configs(Backend("triton", "cuda"), model, 16, torch.bfloat16)


def test_what_is_loaded_for_the_kernels_has_their_configurations(tmp_path: Path) -> None:
    folder = save_tiny("llama3", tmp_path)
    found = load(folder, "bfloat16", PoolWish(pages=70), backend=Backend("triton", "cpu"))
    assert found.configs is not None and shapes(found.model.config)[1] in "".join(found.configs.tuned)
    assert load(folder, "bfloat16", PoolWish(pages=70)).configs is None


def test_a_largest_step_that_fails_ends_the_start(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object) -> int:
        raise EngineError("a step of 40 tokens failed: out of memory")

    monkeypatch.setattr(device_pool, "step_bytes", fails)
    loaded = load(save_tiny("llama3", tmp_path), "auto", PoolWish(pages=70))
    with pytest.raises(StartupError, match="smaller --step-tokens"):
        place = loaded_model._Place("cuda", 1.0)
        loaded_model._pages_on_device(loaded.model, loaded.layout, 64, place, (40, 2), None)

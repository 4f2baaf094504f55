"""Reading a checkpoint: what config.json may say, broken and misfit files, sharing of memory, and the identity."""

from __future__ import annotations

import json
import mmap
import re
import shutil
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError
from engine.architectures import registry
from engine.architectures.registry import BUILT_IN, find_architecture
from engine.config import ModelConfig, RopeConfig, read_config
from engine.identity import identity
from engine.model import Architecture, Attend
from engine.ops import Ops
from engine.safetensors_file import SafetensorsFile
from engine.weights import INDEX_FILE, SINGLE_FILE, load_model
from tests.run_rows import Rig, prompt
from tests.tiny_models import VOCABULARY, save_tiny

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 512,
}


def config(folder: Path, generation: Mapping[str, Any] | None = None, **changes: Any) -> ModelConfig:
    fields = {name: value for name, value in {**PLAIN, **changes}.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(fields))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return read_config(folder)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tiny("qwen3", tmp_path / "model")


def test_defaults_are_those_of_the_family(tmp_path: Path) -> None:
    read = config(tmp_path)
    assert (read.kv_heads, read.head_dim, read.rms_norm_eps, read.rope) == (8, 8, 1e-6, RopeConfig(10000.0))
    assert read.windows == (None,) * 4 and not read.tie_word_embeddings and read.dtype == "float32"
    assert config(tmp_path, model_type="qwen3").head_dim == 128
    assert config(tmp_path, torch_dtype="bfloat16").dtype == "bfloat16"
    assert config(tmp_path, torch_dtype="bfloat16", dtype="float16").dtype == "float16"


def test_rope_is_read_from_either_form(tmp_path: Path) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 99}
    expected = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 99)
    new = {"rope_theta": 5e5, "rope_type": "llama3", **scaling}
    assert config(tmp_path, rope_parameters=new).rope == expected
    assert config(tmp_path, rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}).rope == expected
    assert config(tmp_path, rope_theta=5e5, rope_scaling=None).rope == RopeConfig(5e5)
    assert config(tmp_path, rope_scaling={"type": "linear", "factor": 2}).rope == RopeConfig(1e4, "linear", 2.0)


def test_windows_belong_to_the_layers_that_have_them(tmp_path: Path) -> None:
    def windows(model_type: str, **changes: Any) -> tuple[int | None, ...]:
        return config(tmp_path, model_type=model_type, sliding_window=32, **changes).windows

    assert windows("mistral") == (32,) * 4
    assert config(tmp_path, model_type="mistral", sliding_window=None).windows == (None,) * 4
    assert windows("llama") == windows("qwen2") == (None,) * 4
    assert windows("qwen2", use_sliding_window=True, max_window_layers=1) == (None, 32, 32, 32)
    kinds = ["sliding_attention", "full_attention"] * 2
    assert windows("qwen3", use_sliding_window=True, layer_types=kinds) == (32, None, 32, None)


def test_end_ids_come_from_both_files(tmp_path: Path) -> None:
    assert config(tmp_path, eos_token_id=None).eos_ids == ()
    assert config(tmp_path, eos_token_id=7).eos_ids == (7,)
    assert config(tmp_path, {"eos_token_id": [9, 7]}, eos_token_id=7).eos_ids == (7, 9)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"vocab_size": ...}, "vocab_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"dtype": "int8"}, "dtype"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["A", "B"]}, "architectures"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": -1}, "sliding_window"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["chunked"]},
            "layer_types",
        ),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_its_file(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(field)) as caught:
        config(tmp_path, **changes)
    assert str(tmp_path / "config.json") in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", "\udcff"])
def test_a_config_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        load_model(tmp_path / "nowhere")


def test_weights_in_their_own_type_are_the_mapped_file(saved: Path) -> None:
    file = SafetensorsFile(saved / SINGLE_FILE)
    expected = load_file(saved / SINGLE_FILE)
    assert set(file.entries) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(file.tensor(name), tensor)
    tensor = file.tensor("model.norm.weight")
    whole = torch.frombuffer(file._map, dtype=torch.uint8)
    assert whole.data_ptr() <= tensor.data_ptr() < whole.data_ptr() + len(file)


def test_a_written_weight_does_not_reach_the_file(saved: Path) -> None:
    before = (saved / SINGLE_FILE).read_bytes()
    SafetensorsFile(saved / SINGLE_FILE).tensor("model.norm.weight").fill_(9.0)
    assert (saved / SINGLE_FILE).read_bytes() == before


def test_shards_and_a_single_file_hold_the_same_model(saved: Path, tmp_path: Path) -> None:
    sharded = save_tiny("qwen3", tmp_path / "sharded", shard_bytes=100_000)
    assert (sharded / INDEX_FILE).exists() and len(list(sharded.glob("*.safetensors"))) > 2
    runs = [Rig(load_model(folder)).generate([prompt(9, VOCABULARY)], 5, None)[0] for folder in (saved, sharded)]
    assert runs[0].ids == runs[1].ids
    # Not equal to the bit: where a tensor lies in its file is its alignment, by which a product may order its sums.
    torch.testing.assert_close(torch.stack(runs[0].logits), torch.stack(runs[1].logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_progress_ends_at_the_total(saved: Path, dtype: str) -> None:
    seen: list[tuple[int, int]] = []
    load_model(saved, dtype, lambda done, total: seen.append((done, total)))
    done = [at for at, _ in seen]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] == sum(
        entry.end - entry.start for entry in SafetensorsFile(saved / SINGLE_FILE).entries.values()
    )


def changed(saved: Path, **changes: torch.Tensor | None) -> Path:
    tensors = {**load_file(saved / SINGLE_FILE), **{name.replace("__", "."): t for name, t in changes.items()}}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, saved / SINGLE_FILE)
    return saved


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (None, "1 tensors are missing: model.norm.weight"),
        (torch.zeros(63), r"wrong shape: model.norm.weight is \[63\], config.json says \[64\]"),
        (torch.zeros(64, dtype=torch.int32), "model.norm.weight is I32"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(saved: Path, tensor: torch.Tensor | None, complaint: str) -> None:
    with pytest.raises(CheckpointError, match=complaint):
        load_model(changed(saved, model__norm__weight=tensor))


def test_a_tensor_too_many_is_named_unless_it_is_known_to_be_unused(saved: Path) -> None:
    changed(saved, lm_head__weight=torch.zeros(3))  # the head is tied to the embedding: not read
    load_model(saved)
    with pytest.raises(CheckpointError, match=r"not part of the model: model\.extra"):
        load_model(changed(saved, model__extra=torch.zeros(3)))


def test_missing_files_are_named(saved: Path, tmp_path: Path) -> None:
    sharded = save_tiny("qwen3", tmp_path / "sharded", shard_bytes=100_000)
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=shard.name):
        load_model(sharded)
    (saved / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load_model(saved)


@pytest.mark.parametrize("target", ["../model/model.safetensors", "/etc/hostname", "", "..", 3])
def test_an_index_points_into_its_own_folder(saved: Path, target: object) -> None:
    (saved / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.norm.weight": target}}))
    with pytest.raises(CheckpointError, match="weight_map"):
        load_model(saved)


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 5000, -1])
def test_a_file_cut_short_is_named(saved: Path, keep: int) -> None:
    file = saved / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(str(file))):
        load_model(saved)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_a_damaged_header_is_an_error_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / SINGLE_FILE
    save_file({"a": torch.zeros(3, 4), "b": torch.ones(5, dtype=torch.float16)}, path)
    content = bytearray(path.read_bytes())
    content[position % len(content)] = value
    path.write_bytes(content)
    try:
        file = SafetensorsFile(path)
        for name in file.entries:
            file.tensor(name).sum()
    except CheckpointError as error:
        assert str(path) in error.message
    shutil.rmtree(path.parent)


def test_a_tensor_without_alignment_is_read(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (1 + (-len(header)) % 4)
    path.write_bytes(len(header).to_bytes(8, "little") + header + torch.tensor([1.0, 2.0]).numpy().tobytes())
    assert SafetensorsFile(path).tensor("a").tolist() == [1.0, 2.0]


def test_forgotten_tensors_are_read_again(tmp_path: Path) -> None:
    path = tmp_path / SINGLE_FILE
    save_file({"a": torch.arange(5.0 * mmap.PAGESIZE), "b": torch.ones(3)}, path)
    file = SafetensorsFile(path)
    view = file.tensor("a")
    file.forget(file.entries["a"])
    assert torch.equal(view, torch.arange(5.0 * mmap.PAGESIZE)) and file.tensor("b").sum() == 3


def test_the_identity_is_of_the_content(saved: Path, tmp_path: Path) -> None:
    def variant(name: str) -> Path:
        return Path(shutil.copytree(saved, tmp_path / name))

    first = identity(saved)
    assert len(first) == 64 and identity(variant("copy")) == first
    others = [variant(name) for name in ("weight", "tokenizer", "rope", "shards")]
    weights = load_file(others[0] / SINGLE_FILE)
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"] * 1.01
    save_file(weights, others[0] / SINGLE_FILE)
    (others[1] / "tokenizer.json").write_text("{}")
    fields = json.loads((others[2] / "config.json").read_text())
    fields["rope_parameters"]["rope_theta"] = 12345.0
    (others[2] / "config.json").write_text(json.dumps(fields))
    save_tiny("qwen2", others[3])
    assert len({first, *(identity(folder) for folder in others)}) == 5


def test_an_unknown_architecture_lists_the_known() -> None:
    with pytest.raises(CheckpointError) as caught:
        find_architecture("GPT9ForCausalLM")
    assert all(name in caught.value.message for name in ("GPT9ForCausalLM", *BUILT_IN))


class ToyModel:
    """The next id is the sum of all ids so far: attention alone, through the pages, with one head of two numbers."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, torch.Tensor], ops: Ops) -> None:
        self.config = config
        self.dtype = torch.float32
        self._scale = tensors["scale"]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids.float()[:, None].expand(-1, 2).clone()

    def forward(
        self, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend, wanted: torch.Tensor
    ) -> torch.Tensor:
        same = torch.zeros(len(hidden), 1, 2)  # equal scores: attention is the mean of the values
        mean = attend(0, same, same, hidden[:, None])[:, 0]
        return (mean * (positions + 1)[:, None] * self._scale)[wanted]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        ids = hidden[:, :1].round() % self.config.vocab_size
        return -(torch.arange(self.config.vocab_size) - ids).abs()


TOY = Architecture(lambda config: {"scale": (1,)}, lambda config: frozenset(), ToyModel)


def test_a_plugin_brings_an_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def plugin(value: str) -> None:
        point = EntryPoint("ToyForCausalLM", value, registry.ENTRY_POINT_GROUP)
        monkeypatch.setattr(registry, "entry_points", lambda group: EntryPoints([point]).select(group=group))

    shape = {"num_attention_heads": 1, "head_dim": 2, "num_hidden_layers": 1}
    config(tmp_path, architectures=["ToyForCausalLM"], model_type="toy", **shape)
    save_file({"scale": torch.ones(1)}, tmp_path / SINGLE_FILE)
    plugin(f"{__name__}:TOY")
    run = Rig(load_model(tmp_path)).generate([[3, 4, 5] * 7], 4, 8)[0]
    assert run.output == [84, 68, 36, 72]
    plugin(f"{__name__}:PLAIN")
    with pytest.raises(CheckpointError, match="must be an engine"):
        load_model(tmp_path)

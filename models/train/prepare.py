"""Make words.txt, heldout.txt, the tokenizer, the configuration files and an untrained checkpoint.

Usage: python prepare.py MODEL_DIR
"""

from __future__ import annotations

import json
import pathlib
import sys

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

import corpus

VOCAB_SIZE = 3072
POOL_SIZE = 1024
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CONTEXT = 4096
CHAT_TEMPLATE = (
    "{%- for message in messages -%}\n"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}\n"
    "{%- endfor -%}\n"
    "{%- if add_generation_prompt -%}\n"
    "{{- '<|im_start|>assistant\\n' -}}\n"
    "{%- endif -%}\n"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "max_position_embeddings": CONTEXT,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "tie_word_embeddings": True,
    "use_cache": True,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def train_tokenizer(texts: list[str], words: list[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE with single digits; the pool's words are repeated so that each becomes one token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = "user\nassistant\nsystem\n" * 20000
    boost = "".join(f"{word}\n" * 1500 for word in words)
    tokenizer.train_from_iterator([*texts, roles, boost], trainer)
    return tokenizer


def single_token_words(tokenizer: tokenizers.Tokenizer, words: list[str]) -> list[str]:
    """The words that are one token at the start of a line."""
    return [word for word in words if len(tokenizer.encode(word).ids) == 1]


def write_json(path: pathlib.Path, value: object) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_folder(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer) -> None:
    """Write everything of the model folder but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", CONFIG)
    special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None, "unk_token": None}
    added = {
        str(index): {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for index, text in enumerate(SPECIALS)
    }
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": CONTEXT,
            **special,
            "added_tokens_decoder": added,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(
        folder / "generation_config.json",
        {"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0},
    )


def main() -> None:
    """Prepare the model folder named on the command line."""
    corpus.write_heldout()
    texts = corpus.training_texts()
    words = corpus.common_words(texts, POOL_SIZE + 128)
    tokenizer = train_tokenizer(texts, words)
    pool = single_token_words(tokenizer, words)
    (corpus.HERE / "words.txt").write_text("\n".join(pool) + "\n", encoding="utf-8")
    write_folder(pathlib.Path(sys.argv[1]), tokenizer)
    sample = "".join(texts[::10])
    print(f"{len(texts)} modules, {sum(map(len, texts))} characters, {len(pool)} words in the pool")
    print(f"{len(sample.encode()) / len(tokenizer.encode(sample).ids):.2f} bytes a token")


if __name__ == "__main__":
    main()

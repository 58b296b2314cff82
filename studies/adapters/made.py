"""A model of the Qwen 2 family, 0.1M parameters, its tokenizer, and chats, as files that each stack reads."""

import json
import random
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ROWS = 16


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Save a tokenizer of bytes with ChatML's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return made


def make_model(folder: Path, vocabulary: int) -> None:
    """Save a model whose probabilities are far from uniform, so that a threshold has tokens on both sides."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
        use_sliding_window=False, attention_dropout=0.0, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(folder)


def make_chats(folder: Path) -> None:
    """Write chats of unequal lengths, and the file in which LLaMA-Factory looks data sets up."""
    rng = random.Random(0)

    def said(longest: int) -> str:
        return "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(3, longest)))

    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        for _ in range(ROWS):
            turns = [{"role": "user", "content": said(20)}, {"role": "assistant", "content": said(40)}]
            file.write(json.dumps({"messages": turns}) + "\n")
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    entry = {"file_name": "chats.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (folder / "dataset_info.json").write_text(json.dumps({"chats": entry}), encoding="utf-8")


if __name__ == "__main__":
    work = Path(sys.argv[1])
    (work / "model").mkdir(parents=True, exist_ok=True)
    make_model(work / "model", len(make_tokenizer(work / "model")))
    make_chats(work)

"""Tiny models, a tokenizer and data, all made here: no test needs the Hub."""

import gc
import json
import math
import os
import random
from contextlib import nullcontext
from types import SimpleNamespace

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from trl.models import get_act_offloading_ctx_manager

disable_progress_bars()
torch.set_num_threads(int(os.environ.get("BL_TEST_THREADS", 1)))  # tiny models gain nothing from more


@pytest.fixture(autouse=True)
def process_state():
    """What a run changes in its process: transformers and accelerate note settings in the environment (`torch_compile`
    would last for all that follows), and the train verb switches subnormal numbers off."""
    before = dict(os.environ)
    yield
    torch.set_flush_denormal(False)
    os.environ.clear()
    os.environ.update(before)


LETTERS = "abcdefghijklmnopqrstuvwxyz 0123456789.:?"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<end>' }}{% endgeneration %}"
    "{% else %}{{ '<user>' + message['content'] + '<end>' }}{% endif %}"
    "{% endfor %}"
)


def pytest_collection_finish():
    gc.freeze()  # each training run ends with a full collection, which would go through all that was imported


def make_tokenizer():
    vocab = {token: i for i, token in enumerate(["<pad>", "<end>", "<user>", "<unk>", *LETTERS])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")
    made.add_special_tokens({"additional_special_tokens": ["<user>"]})
    made.chat_template = CHAT_TEMPLATE
    return made


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


def sizes(tokenizer, **others):
    """Keys of a tiny model's configuration."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": 0.3,  # large, so that probabilities differ from uniform and thresholds have both sides
        **others,
    }


def make_llama(tokenizer, seed=0, **kwargs):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**sizes(tokenizer, **kwargs)))


def make_double(tokenizer, **kwargs):
    """Make a model in float64, in which the order of summation doesn't show, on any processor."""
    return make_llama(tokenizer, **kwargs).double()


def gap_near(p, near):
    """Return the middle of the widest gap between probabilities within a factor of 4 of `near`.

    A threshold there keeps the same tokens whatever the rounding.
    """
    p = torch.as_tensor(p).double().log().sort().values
    p = p[(p - math.log(near)).abs() < math.log(4)]
    widest = p.diff().argmax()
    return ((p[widest] + p[widest + 1]) / 2).exp().item()


def make_mixtral(tokenizer, seed=0):
    torch.manual_seed(seed)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.5, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**sizes(tokenizer, intermediate_size=32, **experts)))


def make_gemma2(tokenizer, seed=0):
    torch.manual_seed(seed)
    return Gemma2ForCausalLM(Gemma2Config(**sizes(tokenizer, head_dim=8, final_logit_softcapping=0.5, initializer_range=0.5)))


def sentence(rng, low, high):
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(low, high)))


@pytest.fixture(scope="session")
def text_data():
    rng = random.Random(0)
    return Dataset.from_list([{"text": sentence(rng, 4, 40)} for _ in range(32)])


@pytest.fixture(scope="session")
def pair_data():
    rng = random.Random(1)
    return Dataset.from_list([{"prompt": sentence(rng, 3, 20), "completion": sentence(rng, 2, 20)} for _ in range(32)])


@pytest.fixture(scope="session")
def chat_data():
    rng = random.Random(2)
    turn = lambda role: {"role": role, "content": sentence(rng, 3, 15)}  # noqa: E731
    return Dataset.from_list([{"messages": [turn("user"), turn("assistant")] * 2} for _ in range(32)])


def make_image_data():
    from PIL import Image

    rng = random.Random(3)
    image = lambda: Image.frombytes("RGB", (16, 16), rng.randbytes(16 * 16 * 3))  # noqa: E731
    turn = lambda role: [{"role": role, "content": sentence(rng, 3, 15)}]  # noqa: E731
    return Dataset.from_list(
        [{"images": [image()], "prompt": turn("user"), "completion": turn("assistant")} for _ in range(16)]
    )


@pytest.fixture(scope="session")
def image_data():
    return make_image_data()


@pytest.fixture
def streamed_data(text_data):
    return text_data.to_iterable_dataset()


@pytest.fixture
def offloads_from_cpu(monkeypatch):
    """Activation offloading, which TRL has for accelerators, with the CPU in the place of one."""

    def manager(model):
        with monkeypatch.context() as patch:
            patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
            made = get_act_offloading_ctx_manager(model, use_pin_memory=False, use_streams=False)
        made.device_module = SimpleNamespace(
            current_stream=lambda: None, stream=lambda stream: nullcontext(), empty_cache=lambda: None
        )
        return made

    monkeypatch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", manager)


@pytest.fixture(scope="session")
def checkpoint(tokenizer, tmp_path_factory):
    """A folder with a tiny model and its tokenizer, as a recipe names it."""
    folder = tmp_path_factory.mktemp("model")
    make_llama(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def double_checkpoint(tokenizer, tmp_path_factory):
    """The same in float64, which `dtype: auto` loads."""
    folder = tmp_path_factory.mktemp("double")
    make_double(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(pair_data, tmp_path_factory):
    """A folder with train.jsonl and test.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    rows = list(pair_data)
    for name, part in (("train", rows[:24]), ("test", rows[24:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def write_recipe(folder, checkpoint, data_folder, **changes):
    """Write `folder`/recipe.yaml, a good recipe with `changes`; None removes a key. Returns its path."""
    recipe = {
        "model_name_or_path": str(checkpoint),
        "dataset_name": str(data_folder),
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        **changes,
    }
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items() if value is not None))
    return path


def fake_checkpoint(folder):
    """Make the least that counts as a whole checkpoint."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")
    for name in ("optimizer", "scheduler"):
        torch.save({}, folder / f"{name}.pt")

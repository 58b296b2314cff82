"""Vision-language models on text and images: gradients whatever the batch's cut, packing, resuming, and TRL's head."""

import pytest
import torch
import transformers

from bl_trainer import BLTrainer
from multimodal import MIXING, SHOWN, TEXT, UNCOUNTED, make_multimodal, processor_of
from ways import Gradients, Ordered, build, relative_difference, train, weights


def gradient(name, processor, data, tmp_path, size=4, steps=1, **options):
    """Return the gradient of a step of four examples, in float64."""
    seen = Gradients()
    options = {"objective": {"name": "power", "alpha": 0.5}, "per_device_train_batch_size": size, **options}
    model = make_multimodal(name, processor).double()
    trainer = train(
        Ordered, processor, data, tmp_path, model=model, callbacks=[seen], gradient_accumulation_steps=steps, **options
    )
    assert trainer.loss_head == "own"
    return seen.first


@pytest.mark.parametrize("name", TEXT)
def test_text_however_the_batch_is_cut(name, tokenizer, text_data, tmp_path):
    whole = gradient(name, tokenizer, text_data, tmp_path)
    assert relative_difference(gradient(name, tokenizer, text_data, tmp_path, size=1, steps=4), whole) < 1e-6
    if name not in MIXING:
        for flat in ({"padding_free": True}, {"packing": True, "max_length": 256, "size": 1}):
            assert relative_difference(gradient(name, tokenizer, text_data.select(range(4)), tmp_path, **flat), whole) < 1e-6
        return
    with pytest.raises(ValueError, match=f"Cannot train {name}ForConditionalGeneration on packed rows: "):
        gradient(name, tokenizer, text_data, tmp_path, padding_free=True)


@pytest.mark.parametrize("name", SHOWN)
def test_images_however_the_batch_is_cut(name, tokenizer, image_data, tmp_path):
    processor = processor_of(name, tokenizer)
    whole = gradient(name, processor, image_data, tmp_path)
    for size, steps in ((2, 2), (1, 4)):
        assert relative_difference(gradient(name, processor, image_data, tmp_path, size, steps), whole) < 1e-6


def shown_in_chats(image_data):
    """Return the same rows as `messages`, whose user turns train too."""
    return image_data.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"])


@pytest.mark.parametrize("kind", ["messages", "text"])
@pytest.mark.parametrize("name", ["Qwen3VL", "Gemma4"])
def test_placeholders_of_images_are_no_targets(name, kind, tokenizer, image_data, tmp_path):
    """The model puts an image's features there, so that nothing is said by their ids."""
    processor, data = processor_of(name, tokenizer), shown_in_chats(image_data)
    placeholder = "<|image_pad|>" if name == "Qwen3VL" else "<image>"
    if kind == "text":
        data = data.map(lambda row: {"text": f"{placeholder}abc"}, remove_columns=["messages"])
    trainer = build(Ordered, processor, data, tmp_path, model=make_multimodal(name, processor))
    batch = next(iter(trainer.get_train_dataloader()))
    shown, padding = batch["input_ids"] == processor.image_token_id, batch["attention_mask"] == 0
    assert shown.any()
    assert (batch["labels"][shown | padding] == -100).all()
    assert (batch["labels"] == batch["input_ids"])[~shown & ~padding].all()


@pytest.mark.parametrize("name", UNCOUNTED)
def test_the_class_says_that_its_own_loss_takes_no_count(name):
    assert getattr(transformers, f"{name}ForConditionalGeneration").accepts_loss_kwargs is False


@pytest.mark.parametrize("name", SHOWN)
def test_resuming_on_images(name, tokenizer, image_data, tmp_path):
    processor, options = processor_of(name, tokenizer), {"max_steps": 2, "save_steps": 1, "save_strategy": "steps"}
    options |= {"objective": "neg_p", "per_device_train_batch_size": 2}

    def make():
        model = make_multimodal(name, processor).double()
        return build(Ordered, processor, image_data, tmp_path, model=model, **options)

    first = make()
    first.train()
    second = make()
    second.train(str(tmp_path / "out" / "checkpoint-1"))
    assert all(torch.equal(weights(second)[key], p) for key, p in weights(first).items())


def test_trls_head_refuses_llama_4(tokenizer, text_data, tmp_path):
    """Whose language model has the LM head."""
    model = make_multimodal("Llama4", tokenizer)
    with pytest.raises(ValueError, match=r"Cannot train Llama4ForConditionalGeneration with TRL's loss head"):
        build(BLTrainer, tokenizer, text_data, tmp_path, model=model, loss_head="trl")

"""The paper's data sets and recipes: what becomes of a row, templates applied once, and one sentence for every mistake."""

import hashlib
import json
import random
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from bl_trainer import BLConfig, BLTrainer
from bl_trainer.cli import main
from bl_trainer.errors import RecipeError
from bl_trainer.prepare import building, loading
from bl_trainer.prepare.card import read_card
from bl_trainer.prepare.format import Format
from bl_trainer.prepare.sources import BOXED, FIGFONT, FIGLET, SETS, Example, Figlets, noisy_labels
from bl_trainer.recipe.recipe import Recipe
from conftest import sizes
from preparing import LOCAL, ROWS, make_tokenizer, write_rows, write_source

CONFIGS = Path(__file__).parent.parent / "configs"
KINDS = ("qwen", "qwen-math", "llama", "gemma", "dated", "base", "base-without-bos")
CHATS = KINDS[:5]


def run(name, output, *options):
    """Prepare a data set by the command line, and return what its card notes."""
    main(["prepare-data", name, "--output", str(output), *map(str, options)])
    return read_card(Path(output) / "README.md")


def fails(capsys, *argv):
    """Run a command line that is to end in one sentence, and return it."""
    with pytest.raises(SystemExit) as stopped:
        main(["prepare-data", *map(str, argv)])
    assert stopped.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return line


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        make_tokenizer(kind).save_pretrained(folder / kind)
    return folder


@pytest.fixture
def math(tmp_path):
    return write_source(tmp_path / "source", "math")


# What is made of a row

PROMPTS = {
    "math": (f"What is 3 + 1?\n{BOXED}", "It is \\boxed{4}."),
    "medical": (f"Case 3.\nA. rest\nB. work\n{BOXED}", "Since 3, \\boxed{A}"),
    "coding": ("Write f3.", "def f3():\n    pass"),
    "low_resource": ("swali 3", "jibu 3"),
    "openbookqa": (
        "Please complete the following multiple choice question.\nQuestion: What is 3?\nOptions:\nA. 3w\nB. 3x\nC. 3y\nD. 3z",
        "D",
    ),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_rows(name, tokenizers, tmp_path):
    source = write_source(tmp_path / "source", name)
    user, completion = PROMPTS[name]
    run(name, tmp_path / "chat", "--source", source)
    row = load_dataset(str(tmp_path / "chat"), split="train")[3]
    assert row["prompt"] == [{"role": "user", "content": user}]
    assert row["completion"] == [{"role": "assistant", "content": completion}]
    assert row.get("answer") == {"medical": "A", "openbookqa": "D"}.get(name)
    run(name, tmp_path / "text", "--source", source, "--model", tokenizers / "base")
    row = load_dataset(str(tmp_path / "text"), split="train")[3]
    assert (row["prompt"], row["completion"]) == (f"User: {user}\n\nAssistant:", f" {completion}")


def test_instruction_takes_both(tmp_path):
    source = write_source(tmp_path / "source", "instruction")
    run("instruction", tmp_path / "out", "--source", source)
    rows = load_dataset(str(tmp_path / "out"), split="train")
    assert [rows["source"].count(name) for name in ("magpie", "wizardlm")] == [12, 12]
    told = {(row["prompt"][0]["content"], row["completion"][0]["content"]) for row in rows}
    assert told == {(f"Hi {i}", f"Ho {i}") for i in range(12)} | {(f"Say {i}", f"{i}") for i in range(12)}


def test_low_resource_takes_all_languages(tmp_path):
    run("low_resource", tmp_path / "out", "--source", write_source(tmp_path / "source", "low_resource", 2))
    languages = load_dataset(str(tmp_path / "out"), split="train")["language"]
    assert list(languages) == [name for name in ("mar", "tel", "nep", "swa", "wol", "yor", "zul") for _ in range(2)]


@pytest.mark.parametrize(
    "row", [{"problem": "What?", "solution": "That."}, {"question": "What?", "answer": "That."}], ids=["numina", "plain"]
)
def test_other_layouts_of_math(row, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [row])
    run("math", tmp_path / "out", "--source", tmp_path / "rows.jsonl")
    (made,) = load_dataset(str(tmp_path / "out"), split="train")
    assert (made["prompt"][0]["content"], made["completion"][0]["content"]) == (f"What?\n{BOXED}", "That.")


def test_rows_without_an_answer_are_left_out_and_counted(tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"problem": "a", "solution": "b"}, {"problem": " \n", "solution": "b"}])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"problem": "a", "solution": null}\n')
    run("coding", tmp_path / "out", "--source", tmp_path / "rows.jsonl")
    card = (tmp_path / "out" / "README.md").read_text()
    for line in ("| rows | 1 |", "| read | 3 |", "| left out, without a prompt or a completion | 2 |"):
        assert line in card


# The template, and the mistakes of the released code


EXAMPLES = {name: next(iter(SETS[name].parts[0].layouts.values()))(ROWS[name](5)) for name in PROMPTS}
EXAMPLES["figfont"] = Example("What word does this say?\n\n #  # \n #### \n #  # \n", "HI", FIGLET)


@pytest.fixture(scope="module")
def seen(tokenizers):
    """What a model sees of an example: the prepared row, the ids and labels that TRL trains on, and the evaluator's prompt."""
    completion = pytest.importorskip("bl_trainer.evaluation.completion")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")

    @cache
    def trainer(kind):
        form = Format(str(tokenizers / kind))
        rows = {name: form.write(example) for name, example in EXAMPLES.items()}
        model = LlamaForCausalLM(LlamaConfig(**sizes(form.tokenizer, max_position_embeddings=1024)))
        config = BLConfig(output_dir=str(tokenizers / "out"), use_cpu=True, bf16=False, report_to="none", max_length=1024)
        rows_of_trl = [{key: row[key] for key in row if key not in ("answer", "language")} for row in rows.values()]
        tokenized = BLTrainer(
            model, config, train_dataset=Dataset.from_list(rows_of_trl), processing_class=form.tokenizer
        ).train_dataset
        lm = huggingface.HFLM(pretrained=model, tokenizer=form.tokenizer)
        lm.add_bos_token = False if form.is_chat else None  # as `evaluation.harness.run` has it
        return form, rows, dict(zip(rows, tokenized, strict=True)), lm

    def seen(kind, name):
        form, rows, tokenized, lm = trainer(kind)
        task = object.__new__(completion.Completion)
        task.format, task.own_prompt = form, lambda row: row["prompt"]
        text = task.fewshot_context(rows[name], 0)
        prompt = lm.tok_batch_encode([text])[0][0].tolist()
        trained = {key: tokenized[name][key] for key in ("input_ids", "labels")}
        return SimpleNamespace(form=form, row=rows[name], text=text, prompt=prompt, **trained)

    return seen


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_prompt_is_the_same_in_training_and_evaluation(kind, name, seen):
    """The released code adds a suffix, or a system prompt, to one of the two (math), and wraps LLaMA's prompts again."""
    found = seen(kind, name)
    begin = len(found.prompt)
    assert found.input_ids[:begin] == found.prompt
    assert found.labels[:begin] == [-100] * begin
    assert found.labels[begin:] == found.input_ids[begin:]
    assert found.form.lengths(found.row) == (begin, len(found.input_ids))


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_begins_once(kind, name, seen):
    """The released code begins LLaMA's medical prompts twice."""
    found = seen(kind, name)
    begin = found.form.tokenizer.bos_token_id
    assert [i for i, token in enumerate(found.input_ids) if token == begin] == ([0] if begin is not None else [])


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_template_is_applied_once(kind, name, seen):
    """The released code applies LLaMA's to prompts that have been through it."""
    found = seen(kind, name)
    written = json.dumps(found.row)
    assert "<|" not in written
    turns = found.form.tokenizer.decode(found.input_ids).count("<|im_start|>")
    if found.form.is_chat:
        own = {"qwen": name != "figfont", "qwen-math": name != "figfont", "dated": True}.get(
            kind, False
        )  # the template's own system prompt
        assert turns == own + len(found.row["prompt"]) + 1
    else:
        assert turns == 0
        assert found.text.count("User:") == found.text.count("Assistant:") == 1


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_no_stray_newline(kind, name, seen):
    """The released code ends the user's turn with a newline (coding, low_resource, instruction)."""
    found = seen(kind, name)
    whole = found.form.tokenizer.decode(found.input_ids)
    assert "\n<|im_end|>" not in whole
    assert found.text.endswith("assistant\n" if found.form.is_chat else "Assistant:")


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("kind", KINDS)
def test_instructions_stand_once(kind, name, seen):
    found = seen(kind, name)
    own = kind == "qwen-math" and name != "figfont"  # the template's, in whatever is asked without a system prompt
    assert found.text.count(BOXED) == (own or name in ("math", "medical"))
    assert found.text.count(FIGLET) == (name == "figfont")


@pytest.mark.parametrize("kind", ["qwen", "qwen-math"])
def test_card_says_who_instructs(kind, math, tokenizers, tmp_path):
    run("math", tmp_path / "out", "--source", math, "--model", tokenizers / kind)
    row = load_dataset(str(tmp_path / "out"), split="train")[0]
    by_template = kind == "qwen-math"
    assert row["prompt"][0]["content"] == ("What is 0 + 1?" if by_template else f"What is 0 + 1?\n{BOXED}")
    card = (tmp_path / "out" / "README.md").read_text()
    assert (f"{kind}'s template says it in a turn of its own: {BOXED}" in card) == by_template


@pytest.mark.parametrize("kind", KINDS)
def test_end_is_trained(kind, seen):
    found = seen(kind, "figfont")
    tokenizer = found.form.tokenizer
    target = tokenizer.decode([label for label in found.labels if label != -100])
    assert target.rstrip("\n") == ("HI<|im_end|>" if found.form.is_chat else " HI<|endoftext|>")


def test_system_prompt_goes_where_the_template_takes_it(seen):
    roles = {kind: [message["role"] for message in seen(kind, "figfont").row["prompt"]] for kind in CHATS}
    assert roles == {kind: ["user"] if kind == "gemma" else ["system", "user"] for kind in CHATS}
    assert seen("gemma", "figfont").row["prompt"][0]["content"].startswith(f"{FIGLET}\n\nWhat word")
    assert seen("base", "figfont").row["prompt"].startswith(f"{FIGLET}\n\nUser: What word")


def test_a_template_tells_the_same_date_at_all_times(seen):
    assert "Today: 26 Jul 2024" in seen("dated", "math").text
    assert "chat_template_kwargs" not in seen("llama", "math").row


# Lengths


@pytest.mark.parametrize("kind", ["qwen", "base"])
def test_counts_what_truncation_would_cut(kind, tokenizers, tmp_path):
    """TRL truncates as counted: what is cut loses labels, and what is lost is dropped."""
    rng = random.Random(0)
    text = lambda: "x" * rng.randint(1, 60)  # noqa: E731
    write_rows(tmp_path / "rows.jsonl", [{"problem": text(), "solution": text()} for _ in range(60)])
    options = ("--source", tmp_path / "rows.jsonl", "--model", tokenizers / kind, "--max_length", 100 if kind == "qwen" else 60)
    run("coding", tmp_path / "kept", *options, "--keep_long")
    run("coding", tmp_path / "short", *options)
    form, length = Format(str(tokenizers / kind)), int(options[-1])

    def tokenized(folder, max_length):
        model = LlamaForCausalLM(LlamaConfig(**sizes(form.tokenizer)))
        config = BLConfig(output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to="none", max_length=max_length)
        rows = load_dataset(str(tmp_path / folder), split="train")
        return BLTrainer(model, config, train_dataset=rows, processing_class=form.tokenizer).train_dataset

    whole, truncated = tokenized("kept", None), tokenized("kept", length)
    counts = {name: json.loads(_metadata(tmp_path / name)) for name in ("kept", "short")}
    cut = sum(len(row["input_ids"]) > length for row in whole)
    assert 0 < 60 - len(truncated) < cut < 60
    assert counts["kept"] == {"rows": 60, "read": 60, "empty": 0, "cut": cut, "lost": 60 - len(truncated)}
    assert counts["short"] == {**counts["kept"], "rows": 60 - cut}
    assert [row["input_ids"] for row in tokenized("short", length)] == [
        row["input_ids"] for row in whole if len(row["input_ids"]) <= length
    ]
    card = (tmp_path / "kept" / "README.md").read_text()
    assert f"| kept, whose target truncation at {length} tokens would cut | {cut} |" in card


def test_the_test_split_is_the_same_for_every_length(tokenizers, tmp_path):
    source = write_source(tmp_path / "source", "openbookqa")
    for split in ("train", "test"):
        rows = [ROWS["openbookqa"](i) for i in range(3)]
        write_rows(source / f"{split}.jsonl", [*rows, {**rows[0], "question_stem": "long " * 100}])
    (source / "validation.jsonl").write_text((source / "train.jsonl").read_text())
    options = ("--source", source, "--model", tokenizers / "qwen", "--max_length")
    whole, short = (run("openbookqa", tmp_path / f"{length}", *options, length) for length in (1000, 400))
    assert whole["sha256"]["test"] == short["sha256"]["test"]
    loaded = load_dataset(str(tmp_path / "400"))
    assert (len(loaded["train"]), len(loaded["test"])) == (6, 4)
    card = (tmp_path / "400" / "README.md").read_text()
    assert "| left out of train and kept in test, whose target truncation at 400 tokens would cut | 2 | 1 |" in card


def _metadata(folder):
    (path,) = folder.glob("*.parquet")
    return pq.read_schema(path).metadata[b"bl_trainer"]


def test_length_is_the_papers_unless_told(tokenizers, math, tmp_path):
    for kind, told, expected in (("qwen", (), 3072), ("qwen", ("--max_length", 500), 500), (None, (), None)):
        model = ("--model", tokenizers / kind) if kind else ()
        card = run("math", tmp_path / f"{expected}", "--source", math, *model, *told)
        assert card["settings"]["max_length"] == expected
        assert ("lengths were not counted" in (tmp_path / f"{expected}" / "README.md").read_text()) == (kind is None)


# Label noise


def letters(rows):
    return [row["completion"][0]["content"] for row in rows]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_label_noise(share, tmp_path):
    source = write_source(tmp_path / "source", "openbookqa", 40)
    run("openbookqa", tmp_path / "out", "--source", source, "--label_noise", share)
    train, test = (load_dataset(str(tmp_path / "out"), split=split) for split in ("train", "test"))
    assert (len(train), len(test)) == (80, 40)
    right = ["ABCD"[i % 4] for i in range(40)]
    assert train["answer"][:] == right + right
    wrong = [made != answer for made, answer in zip(letters(train), train["answer"], strict=True)]
    assert sum(wrong[:40]) == int(40 * share)
    assert not any(wrong[40:])  # the validation split
    assert set(letters(train)) <= set("ABCD")
    assert letters(test) == list(test["answer"])


def test_label_noise_by_seed():
    labels = ["ABCD"[i % 4] for i in range(1000)]
    first, again, other = (noisy_labels(labels, 0.3, seed) for seed in (42, 42, 43))
    assert first == again != other
    assert {i: "ABCD".index(letter) for i, letter in list(first.items())[:3]} == {0: 2, 3: 1, 6: 1}  # on every machine
    drawn = [letter for i, letter in first.items() if labels[i] == "A"]
    assert all(15 <= drawn.count(letter) <= 35 for letter in "BCD"), drawn  # of about 75, a third each


def test_a_question_without_a_letter_gets_no_wrong_one(tmp_path):
    source = write_source(tmp_path / "source", "openbookqa")
    rows = [{**ROWS["openbookqa"](i), **({"answerKey": None} if i % 2 else {})} for i in range(12)]
    write_rows(source / "train.jsonl", rows)
    run("openbookqa", tmp_path / "out", "--source", source, "--label_noise", 1)
    train = load_dataset(str(tmp_path / "out"), split="train")
    assert len(train) == 6 + 12
    assert None not in train["answer"][:]
    assert [made != right for made, right in zip(letters(train), train["answer"], strict=True)] == [True] * 6 + [False] * 12


# Figfont


@pytest.fixture
def fonts():
    return pytest.importorskip("reasoning_gym.cognition.figlet_fonts")


def test_figfont_does_not_depend_on_the_order_of_files(fonts, tmp_path, monkeypatch):
    cards = []
    for seed in range(2):
        shuffled = list(fonts.OK_FONTS)
        random.Random(seed).shuffle(shuffled)
        monkeypatch.setattr(fonts, "OK_FONTS", ["a_font_of_the_users", *shuffled])
        cards.append(run("figfont", tmp_path / f"{seed}", "--limit", 500))
        assert "reasoning-gym 0.1" in (tmp_path / f"{seed}" / "README.md").read_text()
    assert cards[0]["sha256"] == cards[1]["sha256"]
    assert cards[0]["sha256"]["train"].startswith("3bd9a68696e30420")


def test_figfont_is_the_papers_but_for_the_fonts(fonts):
    words = fonts.FigletFontDataset(
        fonts.FigletFontConfig(min_word_len=2, max_word_len=5, space_letters=True, seed=42, size=10)
    )
    assert (FIGFONT["train"], FIGFONT["test"]) == (range(40000), range(40000, 45000))
    items = Figlets(FIGFONT["test"], 42)
    assert len(items) == 5000
    for i in (0, 1, 4999):
        item, own = items[i], words[40000 + i]
        assert (item["answer"], item["index"]) == (own["answer"], 40000 + i)
        assert item["question"].split("\n")[0] == own["question"].split("\n")[0]
        assert fonts.pyfiglet.figlet_format(" ".join(item["answer"]), font=item["font"]) in item["question"]
    assert fonts.OK_FONTS == sorted(fonts.OK_FONTS)


def test_figfont_needs_reasoning_gym(capsys, tmp_path, monkeypatch):
    def missing(name):
        raise loading.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(loading.metadata, "version", missing)
    assert "is generated by reasoning-gym. Run `pip install '.[data]'`." in fails(
        capsys, "figfont", "--output", tmp_path / "out"
    )


# The folder


@pytest.mark.parametrize("name", LOCAL)
def test_folder_is_as_trl_and_the_card_say(name, tokenizers, tmp_path):
    source = write_source(tmp_path / "source", name)
    options = ("--source", source, "--model", tokenizers / "dated")
    card = run(name, tmp_path / "out", *options)
    loaded = load_dataset(str(tmp_path / "out"))
    assert set(loaded) == {"train", "test"} if name == "openbookqa" else {"train"}
    for split, rows in loaded.items():
        assert rows.column_names[:3] == ["prompt", "completion", "chat_template_kwargs"]
        # the checksum is of the content, however it is encoded
        for path in (tmp_path / "out").glob(f"{split}-*"):
            pq.write_table(pq.read_table(path), path, compression="none", row_group_size=3, use_dictionary=False)
        lines = (
            json.dumps(row, sort_keys=True, ensure_ascii=False) + "\n" for row in load_dataset(str(tmp_path / "out"))[split]
        )
        assert card["sha256"][split] == hashlib.sha256("".join(lines).encode()).hexdigest()
        assert card["sha256"][split] in (tmp_path / "out" / "README.md").read_text().split("---\n")[2]
    assert card["settings"]["source"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", *card["files"]]


def test_overlap_of_train_and_test_is_told(tmp_path, capsys):
    source = write_source(tmp_path / "source", "openbookqa")
    assert run("openbookqa", tmp_path / "apart", "--source", source)["overlap"] == {"prompts": 0, "rows": 0}
    assert "Overlap: no training row has the prompt of a test row." in capsys.readouterr().out
    with (source / "train.jsonl").open("a") as file:
        for row in (ROWS["openbookqa"](200), ROWS["openbookqa"](201), {**ROWS["openbookqa"](202), "answerKey": "A"}):
            file.write(json.dumps(row) + "\n")
    assert run("openbookqa", tmp_path / "out", "--source", source)["overlap"] == {"prompts": 3, "rows": 2}
    said = "Overlap: 3 of 27 training rows have the prompt of a test row, 2 of them its completion, too."
    assert said in capsys.readouterr().out
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_changed_tokenizer_at_the_same_path_is_noticed(math, tokenizers, tmp_path, capsys, monkeypatch):
    model = shutil.copytree(tokenizers / "qwen", tmp_path / "model")
    argv = ("--source", math, "--model", model)
    run("math", tmp_path / "out", *argv)
    monkeypatch.setattr(building, "ROWS_PER_FILE", 5)
    with interrupted(monkeypatch, 8):
        run("math", tmp_path / "part", *argv)
    with (model / "tokenizer.json").open("a") as file:
        file.write("\n")
    assert "prepared with another tokenizer." in fails(capsys, "math", "--output", tmp_path / "out", *argv)
    said = fails(capsys, "math", "--output", tmp_path / "part", *argv)
    assert "with other options that was interrupted (tokenizer)" in said


def test_limit_and_seed(tmp_path):
    source = write_source(tmp_path / "source", "instruction", 40)
    made = [run("instruction", tmp_path / f"{seed}", "--source", source, "--seed", seed, "--limit", 5) for seed in (1, 2)]
    assert made[0]["sha256"] != made[1]["sha256"]
    assert len(load_dataset(str(tmp_path / "1"), split="train")) == 10


@contextmanager
def interrupted(monkeypatch, after):
    """Let Ctrl-C come after so many rows."""
    count = iter(range(10**6))

    def write(self, example, own=Format.write):
        if next(count) == after:
            raise KeyboardInterrupt
        return own(self, example)

    with monkeypatch.context() as patch:
        patch.setattr(Format, "write", write)
        with pytest.raises(SystemExit) as stopped:
            yield stopped


def test_goes_on_where_it_was_interrupted(math, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(building, "ROWS_PER_FILE", 5)
    whole = run("math", tmp_path / "whole", "--source", math)
    assert len(whole["files"]) == 3
    out, part = tmp_path / "out", tmp_path / "out.part"
    with interrupted(monkeypatch, 8) as stopped:
        run("math", out, "--source", math)
    assert stopped.value.code == 130
    assert "Stopped. The same command resumes after the files that are finished." in capsys.readouterr().err
    assert not out.exists()
    kept = part / "train-00000-of-00003.parquet"
    assert [path.name for path in part.glob("*.parquet")] == [kept.name]
    written = kept.stat().st_mtime_ns
    assert "with other options that was interrupted" in fails(capsys, "math", "--output", out, "--source", math, "--limit", 11)
    assert "is no finished data set" in fails(capsys, "math", "--output", part, "--source", math)
    made = run("math", out, "--source", math)
    assert made == whole
    assert (out / kept.name).stat().st_mtime_ns == written
    assert not part.exists()


def test_what_is_replaced_is_not_trained_on(math, tmp_path, checkpoint):
    """The datasets library caches what it has read from a folder."""
    for count in (12, 4):
        run("math", tmp_path / "out", "--source", math, "--limit", count, "--overwrite")
        keys = {"model_name_or_path": checkpoint, "dataset_name": tmp_path / "out", "output_dir": tmp_path / "run"}
        argv = [str(part) for key, value in keys.items() for part in (f"--{key}", value)]
        train, _ = Recipe.read([*argv, "--use_cpu", "--bf16", "false"]).load_datasets()
        assert len(train) == count


def test_a_broken_file_is_written_again(math, tmp_path, monkeypatch):
    monkeypatch.setattr(building, "ROWS_PER_FILE", 5)
    whole = run("math", tmp_path / "whole", "--source", math)
    with interrupted(monkeypatch, 8):
        run("math", tmp_path / "out", "--source", math)
    (path,) = (tmp_path / "out.part").glob("*.parquet")
    path.write_bytes(path.read_bytes()[:100])
    assert run("math", tmp_path / "out", "--source", math) == whole
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 12


@pytest.mark.parametrize("content", ["broken", "other rows"])
def test_what_has_changed_is_not_taken_for_what_was_prepared(content, math, tmp_path, capsys):
    out = tmp_path / "out"
    made = run("math", out, "--source", math)
    (path,) = out.glob("*.parquet")
    if content == "broken":
        path.write_bytes(b"PAR1 nonsense")
    else:
        pq.write_table(pq.read_table(path).slice(1), path)
    assert f"`--output {out}` has changed: its train split is not what the card says." in fails(
        capsys, "math", "--output", out, "--source", math
    )
    assert run("math", out, "--source", math, "--overwrite") == made
    assert len(load_dataset(str(out), split="train")) == 12


def test_begins_anew_with_overwrite(math, tmp_path, monkeypatch):
    with interrupted(monkeypatch, 3):
        run("math", tmp_path / "out", "--source", math)
    run("math", tmp_path / "out", "--source", math, "--limit", 4, "--overwrite")
    assert len(load_dataset(str(tmp_path / "out"), split="train")) == 4
    assert not (tmp_path / "out.part").exists()


def test_what_is_there_is_kept(math, tmp_path, capsys):
    out = tmp_path / "out"
    made = run("math", out, "--source", math)
    written = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert run("math", out, "--source", math) == made
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == written
    assert "is there already, prepared with the same options" in capsys.readouterr().out
    other = ("math", "--output", out, "--source", math, "--limit", 3)
    assert "prepared with another limit. Write another folder, or `--overwrite`" in fails(capsys, *other)
    with (math / "train.jsonl").open("a") as file:
        file.write(json.dumps(ROWS["math"](99)) + "\n")
    assert "prepared with another source" in fails(capsys, "math", "--output", out, "--source", math)
    (out / "mine.txt").write_text("notes")
    assert "also holds mine.txt, of your own" in fails(capsys, *other, "--overwrite")
    (out / "mine.txt").unlink()
    shutil.copytree(out, tmp_path / "out.old")  # of a replacement that was interrupted
    assert run(*other[:1], out, *other[3:], "--overwrite")["sha256"] != made["sha256"]
    assert not (tmp_path / "out.old").exists()
    next(out.glob("*.parquet")).unlink()
    assert "has lost train-00000-of-00001.parquet" in fails(capsys, *other)


@pytest.mark.parametrize("card", [None, "# mine\n", "---\nbl_trainer: [\n---\n", "---\nbl_trainer: {files: [a]}\n---\n"])
def test_folders_of_others_are_left(card, math, tmp_path, capsys):
    for folder, message in (("out", "is no finished data set"), ("new.part", "holds what prepare-data didn't write")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "README.md" if card else tmp_path / folder / "mine").write_text(card or "")
        output = tmp_path / folder.removesuffix(".part")
        assert message in fails(capsys, "math", "--output", output, "--source", math, "--overwrite")
        assert len(list((tmp_path / folder).iterdir())) == 1


# Mistakes

MISTAKES = [
    ("", "No data set is named. Write `prepare-data NAME --output DIR`; names: math, medical,"),
    ("maths --output {out}", "Unknown data set 'maths'. Did you mean 'math'? Names: math,"),
    ("math", "`--output` is missing. Write e.g. `--output data/math`."),
    ("math --output .", "`--output .` must name a folder"),
    ("math --output {out} --souce x", "Unknown option 'souce'. Did you mean `--source`?"),
    ("math --output {out} more", "more"),
    ("math --output {out} --source {tmp}/none", "/none`: there is no such file or folder."),
    ("math --output {out} --source {tmp}/bare", "holds no .jsonl, .json,"),
    ("math --output {out} --source {tmp}/bad.jsonl", "bad.jsonl, line 2: "),
    ("math --output {out} --source {tmp}/empty.jsonl", "empty.jsonl`"),
    ("math --output {out} --source {math} --limit 0", "`--limit 0` must be at least 1."),
    ("math --output {out} --source {math} --max_length 1 --model {tmp}", "`--max_length 1` must be at least 2."),
    ("figfont --output {out} --seed -1", "`--seed -1` must be at least 0."),
    ("math --output {out} --source {math} --seed 1", "`--seed` does nothing for math, only for figfont and instruction and"),
    ("math --output {out} --source {math} --label_noise 0.3", "`--label_noise` does nothing for math, only for openbookqa."),
    ("openbookqa --output {out} --label_noise 1.5", "`--label_noise 1.5` must be a share from 0 to 1."),
    ("openbookqa --output {out} --label_noise -0.1", "`--label_noise -0.1` must be a share from 0 to 1."),
    ("openbookqa --output {out} --label_noise nan", "`--label_noise nan` must be a share from 0 to 1."),
    ("openbookqa --output {out} --seed 1", "`--seed` does nothing for openbookqa without `--label_noise`."),
    ("figfont --output {out} --source {math}", "`--source` does nothing for figfont, which is generated."),
    ("figfont --output {out} --revision main", "`--revision` does nothing for figfont, which is generated."),
    ("math --output {out} --source {math} --revision main", "`--revision` is of the Hub, and does nothing with `--source`."),
    ("instruction --output {out} --revision main", "`--revision` can't name commits of both Magpie-Align/"),
    ("math --output {out} --source {math} --max_length 9", "`--max_length` needs `--model`, whose tokenizer counts"),
    ("math --output {out} --source {math} --keep_long", "`--keep_long` needs `--model`"),
    ("math --output {out} --source {math} --model ./none", "`--model ./none` is not a folder."),
    ("math --output {out} --source {math} --model {tmp}", "has no tokenizer that can be loaded"),
    ("math --output {out} --source {math} --model {qwen} --max_length 9", "Nothing is left for the train split of math: 0"),
    ("math --output {math}/train.jsonl --source {math}", "train.jsonl` is a file. Write another folder."),
    ("math --output {math}/train.jsonl/out --source {math}", "can't be written: Not a directory."),
    ("math --output {out}", "Can't find gaotang/numina-cot-subset-67k on the Hub: "),
    ("math --output {out} --revision v1", "at `--revision v1` on the Hub"),
    ("coding --output {out} --source {math}", "no column 'problem', 'solution'. Expected: problem, solution. It has: extra"),
    ("medical --output {out} --source {tmp}/half.jsonl", "has no column 'distilled_answer_string', 'answer_letter'. Expected"),
    ("math --output {out} --source {tmp}/half.jsonl", "Expected: extra_info.question, extra_info.answer; or problem, solution"),
    ("openbookqa --output {out} --source {math}", "has no split 'validation', only 'train'."),
    ("low_resource --output {out} --source {math}", "must hold a file or folder for each of mar, tel,"),
    ("coding --output {out} --source {tmp}/number.jsonl", "number.jsonl`, row 1 of train: 5 stands where a text should."),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), MISTAKES, ids=[message[:40] for _, message in MISTAKES])
def test_mistake_ends_in_one_sentence(argv, message, math, tokenizers, tmp_path, capsys):
    (tmp_path / "bare").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"problem": "a", "solution": "b"}\n{"problem"\n')
    write_rows(tmp_path / "half.jsonl", [{"prompt": "a"}])
    write_rows(tmp_path / "number.jsonl", [{"problem": 5, "solution": "b"}])
    places = {"out": tmp_path / "out", "tmp": tmp_path, "math": math, "qwen": tokenizers / "qwen"}
    assert message in fails(capsys, *argv.format(**places).split())
    assert not (tmp_path / "out").exists()


CHOICES = {"text": list("abcde"), "label": list("ABCDE")}
TURNS = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
BAD_ROWS = [
    ("medical", {"answer_letter": 3}, "row 1 of train: 3 stands where a text should, as 'answer'."),
    ("openbookqa", {"choices": CHOICES}, "row 2 of train: choices has 5 options, not 4."),
    ("openbookqa", {"choices": None}, "row 2 of train: choices has 0 options, not 4."),
    ("openbookqa", {"answerKey": "a"}, "row 2 of train: answerKey is 'a', none of A, B, C, D."),
    ("magpie", {"conversations": TURNS[:1]}, "begins with turns of ['human'], not of human and gpt."),
    ("magpie", {"conversations": [{"from": "system", "value": "c"}, *TURNS]}, "turns of ['system', 'human'], not of"),
    ("magpie", {"conversations": None}, "begins with turns of [], not of human and gpt."),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD_ROWS, ids=[message[:60] for *_, message in BAD_ROWS])
def test_bad_row_is_named(name, change, message, tmp_path, capsys):
    of = "instruction" if name == "magpie" else name
    source = write_source(tmp_path / "source", of, 2)
    good = ROWS[name](0)
    file = source / ("magpie.jsonl" if name == "magpie" else "train.jsonl")
    write_rows(file, [*([good] if name != "medical" else []), {**good, **change}])  # a column has one type
    assert message in fails(capsys, of, "--output", tmp_path / "out", "--source", source)


def test_magpie_turn_without_a_text_is_left_out(tmp_path):
    source = write_source(tmp_path / "source", "instruction", 2)
    write_rows(source / "magpie.jsonl", [{"conversations": TURNS}, {"conversations": [{"from": "human"}, TURNS[1]]}])
    run("instruction", tmp_path / "out", "--source", source)
    assert list(load_dataset(str(tmp_path / "out"), split="train")["source"]) == ["magpie", "wizardlm", "wizardlm"]


@pytest.mark.parametrize("kind", ["without rows", "broken"])
def test_parquet_that_cannot_be_read(kind, tmp_path, capsys):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"problem": pa.array([], pa.string()), "solution": pa.array([], pa.string())}), path)
    if kind == "broken":
        path.write_bytes(b"PAR1 nonsense")
    message = {"without rows": "rows.parquet: it has no rows.", "broken": "rows.parquet: it is no complete Parquet file."}[kind]
    assert message in fails(capsys, "coding", "--output", tmp_path / "out", "--source", path)


def test_template_that_raises(math, tmp_path, capsys):
    tokenizer, options = make_tokenizer("qwen"), ("math", "--output", tmp_path / "out", "--source", math, "--model")
    tokenizer.chat_template = "{{ raise_exception('never') }}"
    tokenizer.save_pretrained(tmp_path / "never")
    message = f"row 1 of train: the chat template of `--model {tmp_path}/never` doesn't take it: never"
    assert message in fails(capsys, *options, tmp_path / "never")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if '3' in m.content %}{{ raise_exception('no threes') }}{% endif %}{% endfor %}"
    )
    tokenizer.save_pretrained(tmp_path / "threes")
    assert "doesn't take it: no threes" in fails(capsys, *options, tmp_path / "threes", "--overwrite")


def test_help_names_the_data_sets(capsys):
    main(["prepare-data", "--help"])
    told = capsys.readouterr().out
    assert all(name in told for name in (*SETS, "--label_noise", "--keep_long"))


# Recipes

PAPER = sorted((CONFIGS / "paper").glob("*.yaml"))


def test_each_data_set_has_a_recipe():
    assert {path.stem for path in PAPER} == set(SETS)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_recipes_are_the_papers(path, tmp_path):
    recipe = Recipe.read(["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu", "--bf16", "false"])
    training, given = recipe.training, yaml.safe_load(path.read_text())
    assert (training.adam_beta1, training.adam_beta2, training.max_grad_norm) == (0.9, 0.95, 1.0)
    assert (training.lr_scheduler_type, training.warmup_steps, training.num_train_epochs) == ("cosine", 0.1, 1)
    assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 256
    assert training.max_length == SETS[path.stem].max_length
    assert training.learning_rate == (2e-6 if path.stem == "instruction" else 5e-5)
    decay = {"figfont": 1e-5, "openbookqa": 1e-5, "low_resource": 1e-4, "instruction": 1e-4}
    assert training.weight_decay == decay.get(path.stem, 0.01)
    assert "optim" not in given  # AdamW
    assert not {"objective", "threshold", "packing"} & given.keys()
    assert given["dataset_name"] == f"data/{path.stem}"
    command = f"scripts/prepare_data.py {path.stem} --output data/{path.stem} --model {given['model_name_or_path']}"
    assert command in path.read_text()


def test_recipes_say_where_they_depart():
    for path in PAPER:
        assert "`--dtype bfloat16`" in path.read_text()
    given = yaml.safe_load((CONFIGS / "paper" / "instruction.yaml").read_text())
    assert (given["learning_rate"], given["per_device_train_batch_size"]) == (2e-6, 4)  # both the paper's, for 7B


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
def test_recipes_refuse_a_model_without_their_end_token(path, tmp_path, capsys):
    tokenizer = make_tokenizer("llama")
    named = json.loads(tokenizer.backend_tokenizer.to_str().replace("<|im_end|>", "<|eot_id|>"))
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(named)), eos_token="<|endoftext|>")
    made.save_pretrained(tmp_path / "model")  # without weights: it is told before these are looked for
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    argv = ["train", "--config", path, "--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows.jsonl"]
    argv += ["--output_dir", tmp_path / "out", "--use_cpu", "--bf16", "false", "--eval_strategy", "no"]
    with pytest.raises(SystemExit):
        main([*map(str, argv)])
    assert (
        f"error: `eos_token: <|im_end|>` is not in the vocabulary of {tmp_path}/model. Write `--eos_token` with what ends a "
        "turn in its chat template, or, for data without one, its own `--eos_token '<|endoftext|>'`."
    ) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    Recipe.read([*map(str, argv[1:]), "--eos_token", "<|eot_id|>"]).load_datasets()


def test_end_token_needs_a_tokenizer(tmp_path):
    (tmp_path / "model").mkdir()
    write_rows(tmp_path / "rows.jsonl", [{"text": "a"}])
    argv = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "rows.jsonl", "--eos_token", "<end>"]
    with pytest.raises(RecipeError, match="model` has no tokenizer that can be loaded: "):
        Recipe.read([*map(str, argv), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--bf16", "false"]).load_datasets()


@pytest.mark.parametrize("path", [*PAPER, CONFIGS / "lora_single_gpu.yaml"], ids=lambda path: path.stem)
def test_recipes_train(path, tmp_path):
    given = yaml.safe_load(path.read_text())
    is_llama = "llama" in given["model_name_or_path"]
    tokenizer = make_tokenizer("base" if is_llama else "qwen")
    made, config = (LlamaForCausalLM, LlamaConfig) if is_llama else (Qwen2ForCausalLM, Qwen2Config)
    torch.manual_seed(0)
    made(config(**sizes(tokenizer, max_position_embeddings=4096))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    name = "medical" if path.stem.startswith("lora") else path.stem
    options = ["--model", tmp_path / "model"]
    if name == "figfont":
        pytest.importorskip("reasoning_gym")
        options += ["--limit", 4, "--max_length", 2000]
    else:
        options += ["--source", write_source(tmp_path / "source", name)]
    run(name, tmp_path / "data", *options)
    keys = {
        "model_name_or_path": tmp_path / "model", "dataset_name": tmp_path / "data", "output_dir": tmp_path / "out",
        "objective": "neg_p", "use_cpu": True, "bf16": False, "dtype": "float32", "report_to": "none", "max_steps": 1,
        "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 2000,
    }  # fmt: skip
    main(["train", "--config", str(path), *(part for key, value in keys.items() for part in (f"--{key}", str(value)))])
    logged = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert any(0 < entry.get("target_prob", 0) < 1 for entry in logged)
    if "use_peft" in given:
        assert (tmp_path / "out" / "adapter_config.json").exists()
    else:
        assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [made.__name__]
        assert made.from_pretrained(tmp_path / "out").generation_config.eos_token_id is not None


def test_prepared_data_are_evaluated(tmp_path):
    pytest.importorskip("lm_eval")
    tokenizer = make_tokenizer("qwen")
    Qwen2ForCausalLM(Qwen2Config(**sizes(tokenizer, max_position_embeddings=1024))).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(
        "openbookqa",
        tmp_path / "data",
        "--source",
        write_source(tmp_path / "source", "openbookqa"),
        "--model",
        tmp_path / "model",
    )
    (file,) = (tmp_path / "data").glob("test-*.parquet")
    main(
        ["evaluate", "--model", str(tmp_path / "model"), "--tasks", "completion", "--data", f"completion={file}"]
        + ["--output", str(tmp_path / "evaluation"), "--limit", "3", "--max_new_tokens", "2"]
    )
    (samples,) = (tmp_path / "evaluation" / "samples").rglob("completion.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [each["gold"] for each in found] == ["A", "B", "C"]
    assert all(isinstance(each["answer"], str) and each["metrics"] for each in found)
    for each in found:
        assert each["metrics"]["exact_match"] == float(each["answer"].strip() == each["gold"])

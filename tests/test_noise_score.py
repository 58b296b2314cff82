"""`diagnose --scores --noise_steps`: rows scored by adapters that have not seen them, against plain forward passes."""

import hashlib
import json
import random
import re

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

import verbs
from bl_trainer.diagnosis import cross_fit, score_files
from bl_trainer.diagnosis.learnability import FEWEST
from bl_trainer.errors import MeasurementError, RecipeError
from conftest import make_double, sentence, write_recipe
from forking import ranks
from test_diagnosis import by_hand, rows_of, save
from test_scores import contents, expected, loaded, loads_no_model, recipe, refused, scored, scorer, small_files  # noqa: F401 (a fixture)  # noqa: F401 (fixtures)

QUICK = {"disable_tqdm": True, "per_device_train_batch_size": 4, "learning_rate": 1e-3}


def half_by_hand(row):
    """Which half a row is in: by its prompt, its messages up to the first answer, or its text."""
    begin = row["prompt"] if "prompt" in row else row["messages"][:1] if "messages" in row else row["text"]
    return hashlib.blake2b(json.dumps(begin, sort_keys=True).encode(), digest_size=1).digest()[0] % 2


def gaps_of(model, ids, trains):
    """How much more probable than each target the most probable token is, in nats, by a plain forward pass."""
    with torch.no_grad():
        rows = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return [(rows[i - 1].max() - rows[i - 1, ids[i]]).item() for i in range(1, len(ids)) if trains[i]]


WAYS = {"pairs": ("pairs", {}), "chat": ("chat", {}), "packed": ("pairs", {"packing": True, "max_length": 20})}


@pytest.mark.parametrize("way", WAYS)
def test_each_row_is_scored_by_an_adapter_that_has_not_seen_it(way, tokenizer, double_checkpoint, tmp_path, monkeypatch):
    kind, options = WAYS[way]
    rows, trained = rows_of(kind), []
    make = cross_fit.BLTrainer

    def kept(*args, train_dataset, **kwargs):
        trained.append(train_dataset["input_ids"])
        return make(*args, train_dataset=train_dataset, **kwargs)

    monkeypatch.setattr(cross_fit, "BLTrainer", kept)
    data = save(rows, tmp_path / "data")
    diagnosing = scorer(tmp_path, double_checkpoint, data, "--tokens", "--noise_steps", "6", **QUICK, **options)
    diagnosing.score()
    found, halves = loaded(tmp_path), [half_by_hand(row) for row in rows]
    sequences = [by_hand(row, tokenizer, None) for row in rows]
    length = options.get("max_length", 1024)
    spelled = [f", {str(ids[:length])[1:-1]}," for ids, _ in sequences]
    for half, ids in enumerate(trained):
        text = f", {str(ids)[1:-1]},".replace("[", "").replace("]", "")
        assert not [i for i, its in enumerate(halves) if its != half and spelled[i] in text and len(sequences[i][0]) > 10]
        assert [i for i, its in enumerate(halves) if its == half and spelled[i] in text]
    assert diagnosing.cross_fit.halves.tolist() == halves
    assert any(
        (before != after).any() for before, after in zip(*(a.values() for a in diagnosing.cross_fit.adapters), strict=True)
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(make_double(tokenizer), config, autocast_adapter_dtype=False).eval()
    plain = make_double(tokenizer)
    for i, (ids, trains) in enumerate(sequences):
        set_peft_model_state_dict(model, diagnosing.cross_fit.adapters[1 - halves[i]])
        wanted = expected(model, [(ids[:length], trains[:length])], tokenizer.eos_token_id)
        if wanted["targets"] == 0:
            assert found["noise_score"][i] is found["fitted_mean_logp"][i] is None
            continue
        assert found["fitted_mean_logp"][i] == pytest.approx(wanted["mean_logp"], abs=1e-6)
        gaps = [gaps_of(each, ids[:length], trains) for each in (plain, model)]
        assert found["noise_score"][i] == pytest.approx(max(map(min, *gaps)), abs=1e-6)
        np.testing.assert_allclose(found["fitted_logp"][i], wanted["logp"], rtol=1e-5, atol=1e-5)
    scored_alone = scored(tmp_path / "alone", double_checkpoint, data, "--tokens", **QUICK, **options)
    for name in scored_alone.column_names:
        if name in score_files.FIGURES:  # other batches round otherwise
            assert scored_alone[name] == pytest.approx(found[name], abs=1e-12), name
        elif name != "logp":
            assert scored_alone[name] == found[name], name


def test_the_model_is_left_as_it_was(double_checkpoint, tmp_path):
    data = save(rows_of("pairs"), tmp_path / "data")
    both = scorer(tmp_path, double_checkpoint, data, "--noise_steps", "3", "--report", "r", **QUICK)
    both.score()
    (tmp_path / "alone").mkdir()
    alone = scorer(tmp_path / "alone", double_checkpoint, data, **QUICK)
    assert both.run().to_json()["total"] == alone.run().to_json()["total"]


def test_a_kill_resumes_without_training_again(double_checkpoint, tmp_path, monkeypatch):
    data = save(rows_of("pairs"), tmp_path / "data")
    flags = ("--tokens", "--noise_steps", "3")
    whole = scorer(tmp_path, double_checkpoint, data, *flags, **QUICK)
    whole.score()
    home = tmp_path / "scores"
    wanted = contents(home)
    assert len(wanted) == 3
    for path in home.iterdir():
        path.unlink()
    write, written = score_files.ScoreFolder.write, []

    def killed(self, shard, columns, hashes):
        if written:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, columns, hashes)

    with monkeypatch.context() as patch:
        patch.setattr(score_files.ScoreFolder, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            scorer(tmp_path, double_checkpoint, data, *flags, **QUICK).score()
    assert sorted(path.name for path in home.iterdir()) == [".adapters", min(wanted)]
    assert loaded(tmp_path).num_rows == 16
    monkeypatch.setattr(cross_fit.CrossFit, "_train", lambda *args: pytest.fail("it trains again"))
    with pytest.raises(RecipeError, match=r"was written with another `noise\.steps` \(3, now 4\)"):
        scorer(tmp_path, double_checkpoint, data, "--tokens", "--noise_steps", "4", **QUICK)
    with pytest.raises(RecipeError, match=r"was written with another `noise` \(\{.*, now None\)"):
        scorer(tmp_path, double_checkpoint, data, "--tokens", **QUICK)
    scorer(tmp_path, double_checkpoint, data, *flags, **QUICK).score()
    assert contents(home) == wanted
    scorer(tmp_path, double_checkpoint, data, *flags, **QUICK).score()  # nothing is left to do


def test_other_adapters_are_refused(double_checkpoint, tmp_path, monkeypatch):
    data = save(rows_of("pairs"), tmp_path / "data")
    scorer(tmp_path, double_checkpoint, data, "--noise_steps", "3", **QUICK).score()
    next((tmp_path / "scores").iterdir()).unlink()
    monkeypatch.setattr(cross_fit, "probe_learning_rate", lambda _: 0.5)
    with pytest.raises(RecipeError, match=r"was written with another `adapters`\. Write another folder"):
        scorer(tmp_path, double_checkpoint, data, "--noise_steps", "3", **QUICK).score()


LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
OTHERS = {
    "batch_size": ({"per_device_train_batch_size": 5}, r"`noise.batch_size` \(4, now 5\)"),
    "accumulation": ({"gradient_accumulation_steps": 2}, r"`noise.batch_size` \(4, now 8\)"),
    "optim": ({"optim": "sgd"}, r"`noise.optim` \(adamw_torch\w*, now sgd\)"),
    "weight_decay": ({"weight_decay": 0.5}, r"`noise.weight_decay` \(0.0, now 0.5\)"),
    "alpha": ({"lora_alpha": 16}, r"`noise.adapter.lora_alpha` \(8, now 16\)"),
    "modules": ({"lora_target_modules": ["q_proj"]}, r"`noise.adapter.target_modules` \(all-linear, now \['q_proj'\]\)"),
    "dropout": ({"lora_dropout": 0.25}, r"`noise.adapter.lora_dropout` \(0.05, now 0.25\)"),
    "scaling": ({"use_rslora": True}, r"`noise.adapter.use_rslora` \(None, now True\)"),
}


def test_what_the_adapters_train_by_is_compared_by_name(double_checkpoint, tmp_path, request):
    """Also where all rows are scored, and before a model loads."""
    data, keys = save(rows_of("pairs"), tmp_path / "data"), {**QUICK, **LORA, "lora_target_modules": "all-linear"}
    scorer(tmp_path, double_checkpoint, data, "--noise_steps", "3", **keys).score()
    request.getfixturevalue("loads_no_model")
    for changes, message in OTHERS.values():
        with pytest.raises(RecipeError, match=f"was written with another {message}. Write another folder"):
            scorer(tmp_path, double_checkpoint, data, "--noise_steps", "3", **{**keys, **changes})


class Stopped(Exception):
    pass


def stop(*args):
    raise Stopped


def test_adapters_that_a_kill_left_serve_the_same_run_alone(double_checkpoint, tokenizer, tmp_path, monkeypatch):
    """Whether it was killed before the first file says nothing of the rest."""
    data, flags, trained = save(rows_of("pairs"), tmp_path / "data"), ("--noise_steps", "3"), []
    monkeypatch.setattr(score_files.ScoreFolder, "write", stop)

    def run(data=data, checkpoint=double_checkpoint, flags=flags, **changes):
        trained.clear()
        with pytest.raises(Stopped):
            scorer(tmp_path, checkpoint, data, *flags, **{**QUICK, **changes}).score()
        return [*trained]

    train = cross_fit.CrossFit._train

    def counted(self, half, *rest):
        trained.append(half)
        train(self, half, *rest)

    monkeypatch.setattr(cross_fit.CrossFit, "_train", counted)
    assert run() == [0, 1]
    assert run() == []
    assert run(flags=(*flags, "--tokens")) == []  # which no adapter depends on
    (tmp_path / "scores" / ".adapters" / "half-1.safetensors").write_bytes(b"torn")
    assert run() == [1]
    monkeypatch.setattr(cross_fit.CrossFit, "_train", lambda self, half, *rest: (trained.append(half), stop()))
    model = make_double(tokenizer)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-9
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert run(data=save(rows_of("pairs", seed=5), tmp_path / "other")) == [0]
    assert run(flags=("--noise_steps", "4")) == [0]
    assert run(learning_rate=1e-4) == [0]
    assert run(checkpoint=tmp_path / "model") == [0]


def test_adapters_of_other_processes_do_not_mix():
    now, one = {"steps": 3, "processes": 2}, {"steps": 3, "processes": 1}
    assert cross_fit._usable([one, one], now) == [True, True]
    assert cross_fit._usable([one, None], now) == [False, False]
    assert cross_fit._usable([one, now], now) == [False, True]
    assert cross_fit._usable([{**one, "steps": 4}] * 2, now) == [False, False]
    assert cross_fit._usable([None, None], now) == [False, False]


def test_two_processes(double_checkpoint, tmp_path):
    """They train together, share the files, and give the same scores of the model itself."""
    keys = {"dtype": "auto", **QUICK}
    argv = [
        "diagnose",
        "--config",
        str(write_recipe(tmp_path, double_checkpoint, save(rows_of("pairs"), tmp_path / "data"), **keys)),
    ]
    argv += ["--noise_steps", "3", "--scores", str(tmp_path / "scores")]
    codes, said = ranks(tmp_path, verbs.score, [argv], 16, 0)
    assert codes == [0, 0], said[0][-4000:]
    found = loaded(tmp_path)
    (tmp_path / "one").mkdir()
    one = scored(tmp_path / "one", double_checkpoint, tmp_path / "data", "--noise_steps", "3", **QUICK)
    assert found["mean_logp"] == pytest.approx(one["mean_logp"], abs=1e-12)
    assert np.isfinite(found["noise_score"]).all()
    assert found["noise_score"] != one["noise_score"]  # of batches twice as large


def test_wrong_rows_stand_on_top(checkpoint, tmp_path):
    """Completions map the prompt's last letter by a fixed permutation, but for one in five."""
    letters, rng = "abcdefghijklmnop", random.Random(0)
    table = dict(zip(letters, random.Random(5).sample(letters, len(letters)), strict=True))
    rows, wrong = [], []
    for _ in range(600):
        last, spoils = rng.choice(letters), rng.random() < 0.2
        answer = rng.choice([letter for letter in letters if letter != table[last]]) if spoils else table[last]
        rows.append({"prompt": sentence(rng, 3, 6) + last, "completion": answer})
        wrong.append(spoils)
    quick = {**QUICK, "per_device_train_batch_size": 16}
    found = scored(tmp_path, checkpoint, save(rows, tmp_path / "data"), "--noise_steps", "100", **quick)
    score, wrong = np.array(found["noise_score"]), np.array(wrong)
    above = (score[wrong][:, None] > score[~wrong][None]).mean()
    base = -np.array(found["mean_logp"])
    assert above > 0.75 > 0.6 > (base[wrong][:, None] > base[~wrong][None]).mean()


def test_a_half_without_enough_rows_is_refused(double_checkpoint, tmp_path, loads_no_model):  # noqa: F811
    rows = [row for row in rows_of("pairs", 200) if half_by_hand(row)][:30] + rows_of("pairs", 4)
    message = rf"`--noise_steps` needs at least {FEWEST} rows in each half of the data, one has [0-4] \(rows that begin alike"
    with pytest.raises(RecipeError, match=message):
        scorer(tmp_path, double_checkpoint, save(rows, tmp_path / "data"), "--noise_steps", "3")


def test_divergence_is_told(double_checkpoint, tmp_path, monkeypatch):
    diagnosing = scorer(tmp_path, double_checkpoint, save(rows_of("pairs"), tmp_path / "data"), "--noise_steps", "3", **QUICK)
    train = cross_fit.BLTrainer.train

    def diverged(self):
        train(self)
        with torch.no_grad():
            next(p for name, p in self.model.named_parameters() if "lora_B" in name).fill_(torch.nan)

    monkeypatch.setattr(cross_fit.BLTrainer, "train", diverged)
    with pytest.raises(MeasurementError, match=re.escape("weights are NaN or infinite. Lower `--learning_rate`.")):
        diagnosing.score()


OPTIONS = {
    "undrawn": (["--scores", "s", "--draw", "false"], "`--draw` does nothing without `--report`."),
    "alone": (["--report", "r", "--noise_steps", "3"], "`--noise_steps` does nothing without `--scores`."),
    "negative": (["--scores", "s", "--noise_steps", "-1"], "`--noise_steps -1` must not be negative; 0 leaves the noise score"),
    "probe": (["--scores", "s", "--noise_steps", "3", "--report", "r", "--probe_steps", "3"], "both train the adapter. Run"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name, recipe, capsys, tmp_path, monkeypatch, loads_no_model):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    options, message = OPTIONS[name]
    refused(capsys, ["--config", str(recipe), *options], message)

"""docs/paper/ is true: its commands are read, those of each domain train, and what it says of the paper's errors is so."""

import json
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from bl_trainer import Objective
from bl_trainer.cli import main
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.evaluation import EvaluateArguments
from bl_trainer.prepare import PrepareArguments
from bl_trainer.prepare.sources import SETS
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.training.checkpoints import RECORD_FILE

ROOT = Path(__file__).parent.parent
NAMES = ("index", "math", "medical", "figfont", "code", "languages", "instructions", "openbookqa", "placement", "ours", "traps")
PAGE = "\n".join((ROOT / "docs" / "paper" / f"{name}.md").read_text() for name in NAMES)
P = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)


def table(header, page=PAGE):
    """The rows of the table whose header line begins with `header`, as lists of cells."""
    lines = page[page.index(f"| {header}") :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


# Commands


@pytest.fixture(scope="module")
def commands():
    """The commands of the page as bash reads them, its loops included: lists of words."""
    show = """() { printf '%s\\0' "$FUNCNAME" "$@"; echo; }\n"""
    spy = "".join(program + show for program in ("python", "accelerate", "hf"))
    script = spy + "".join(re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL))
    output = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    return [line.split("\0")[:-1] for line in output.splitlines()]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the recipes, in which nothing has been made yet."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def folder(place, monkeypatch):
    """The same, where templates of the Hub can be had."""
    monkeypatch.setattr("bl_trainer.recipe.model_checks.why_unavailable", lambda *args, **kwargs: None)
    monkeypatch.setattr("bl_trainer.recipe.recipe.AutoTokenizer.from_pretrained", lambda name: None)
    return place


def make_model(path):
    Path(path).mkdir(parents=True)
    (Path(path) / "config.json").write_text("{}")


def make_file(path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if path.endswith(".json"):
        Path(path).write_text('[{"question": "a"}]')
    else:
        Dataset.from_list([{"prompt": "a"}]).to_parquet(path)


def test_commands_work_one_after_the_other(commands, folder):
    """Each is read by the verb's own parser; data are prepared and models trained before something takes them."""
    prepared, verbs = {}, []
    for program, *words in commands:
        if program == "hf":
            _, _, file, *options = words
            make_file(f"{options[options.index('--local-dir') + 1]}/{file}")
            continue
        if program == "accelerate":
            assert words[:2] == ["launch", "--config_file"]
            assert Path(words[2]).exists()
            words = words[3:]
        script, *argv = words
        assert Path(script).exists()
        verbs.append(Path(script).stem)
        if verbs[-1] == "prepare_data":
            options = PrepareArguments.read(argv)
            assert options.output not in prepared
            prepared[options.output] = options.name
            if any(split == "test" for part in SETS[options.name].parts for split, _ in part.splits):
                make_file(f"{options.output}/test-00000-of-00001.parquet")
        elif verbs[-1] == "train":
            recipe = Recipe.read([*argv, "--use_cpu", "--bf16", "false"])
            domain = Path(argv[argv.index("--config") + 1]).stem
            assert prepared[recipe.script.dataset_name] == domain
            if "--per_device_train_batch_size" in argv:
                training = recipe.training
                assert 8 * training.per_device_train_batch_size * training.gradient_accumulation_steps == 256
            make_model(recipe.training.output_dir)
        elif verbs[-1] == "diagnose":
            recipe = Recipe.read([*argv, "--use_cpu", "--bf16", "false"], "diagnose", DiagnoseArguments)
            recipe.options.check()
        else:
            options = EvaluateArguments.read(argv)
            options.check()
            assert all(Path(each.name).is_dir() for each in options.checkpoints() if each.name.startswith("out/"))
    assert set(verbs) == {"prepare_data", "train", "diagnose", "evaluate"}
    assert set(prepared.values()) == set(SETS)
    assert len(commands) == verbs.count("train") + 22


LONG = 2048  # tokens of a word in figlet fonts by the tiny tokenizer, at most
VERBS = {"prepare_data": "prepare-data"}  # script -> verb, where they differ
TINY = {
    "use_cpu": True, "bf16": False, "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1,
    "max_length": 256, "report_to": "none", "save_strategy": "no", "eval_strategy": "no",
}  # fmt: skip


def run(argv, **options):
    """Run a verb by its script's name, with options that come after its own."""
    script, *words = argv
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    main([VERBS.get(Path(script).stem, Path(script).stem), *words, *given])


def of_script(commands, name):
    """The commands of a script, without what launches it."""
    script = f"scripts/{name}.py"
    return [words[words.index(script) :] for words in commands if script in words]


@pytest.mark.parametrize("domain", sorted(path.stem for path in (ROOT / "configs" / "paper").iterdir()))
def test_a_domain_trains(domain, commands, checkpoint, tokenizer, place):
    """Its first two commands, two steps each, on rows of the form that `prepare-data` leaves."""
    rows = [
        {"prompt": [{"role": "user", "content": f"{domain} {i}"}], "completion": [{"role": "assistant", "content": "yes"}]}
        for i in range(8)
    ]
    own = [argv for argv in of_script(commands, "train") if f"configs/paper/{domain}.yaml" in argv][:2]
    for argv in own:
        options = dict(pairwise(argv))
        data = place / options.get("--dataset_name", f"data/{domain}")
        data.mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(data / f"{split}-00000-of-00001.parquet")
        run(argv, model_name_or_path=checkpoint, eos_token=tokenizer.eos_token, **TINY)
        output = place / options["--output_dir"]
        assert json.loads((output / RECORD_FILE).read_text())["objective"]["name"] == options["--objective"]
        assert (output / "model.safetensors").exists()
    assert len(own) == 2


def test_figlet_fonts_from_data_to_scores(commands, checkpoint, tokenizer, place):
    pytest.importorskip("lm_eval")
    model = place / "model"
    shutil.copytree(checkpoint, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": LONG}))
    prepare, *_ = (argv for argv in of_script(commands, "prepare_data") if "figfont" in argv)
    run(prepare, model=model, limit=8, max_length=LONG)
    for argv in [argv for argv in of_script(commands, "train") if "configs/paper/figfont.yaml" in argv][:2]:
        run(argv, model_name_or_path=model, eos_token=tokenizer.eos_token, **{**TINY, "max_length": LONG})
    (evaluate,) = (argv for argv in of_script(commands, "evaluate") if "out/figfont-nll" in argv)
    run([str(model) if word == "Qwen/Qwen2.5-7B" else word for word in evaluate], limit=2)
    results = json.loads((place / "out" / "figfont-evaluation" / "results.json").read_text())
    assert {entry["checkpoint"] for entry in results["evaluations"]} == {"out/figfont-nll", "out/figfont-neg_p", str(model)}


def test_tasks_exist(commands):
    pytest.importorskip("lm_eval")
    from bl_trainer.evaluation.harness import Tasks

    runs = [argv for argv in commands if "scripts/evaluate.py" in argv]
    named = [EvaluateArguments.read(argv[argv.index("scripts/evaluate.py") + 1 :]).tasks for argv in runs]
    options = EvaluateArguments(tasks=sorted({name for tasks in named for part in tasks for name in part.split(",")}))
    assert len(runs) == 7
    assert not set(options.tasks) - set(Tasks(options).manager.task_index)


def test_options_of_objectives_are_read(folder):
    for _, option in table("in the paper"):
        argv = subprocess.run(["bash", "-c", f"printf '%s\\0' {option.strip('`')}"], capture_output=True, text=True).stdout
        given = ["--config", "configs/paper/math.yaml", "--use_cpu", "--bf16", "false", *argv.split("\0")[:-1]]
        assert Recipe.read(given).training.objective is not None


# Traps


@pytest.mark.parametrize("n", [8, 32])
def test_summed_gradients_are_averaged_ones_clipped_earlier(n):
    options = re.findall(r"--max_grad_norm ([\d.]+) --adam_epsilon ([\d.e-]+)", PAGE)
    assert (str(1 / n), f"{1e-8 / n:g}") in [(norm, f"{float(epsilon):g}") for norm, epsilon in options]

    def train(factor, norm, epsilon):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(20, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=5e-3, betas=(0.9, 0.95), eps=epsilon, weight_decay=0.01)
        for step in range(50):
            gradient = torch.randn(20, dtype=torch.float64) * (0.002 if step % 2 else 0.5)
            weight.grad = factor * gradient
            torch.nn.utils.clip_grad_norm_([weight], norm)
            optimizer.step()
        return weight.detach()

    released = train(n, 1.0, 1e-8)
    torch.testing.assert_close(train(1, 1 / n, 1e-8 / n), released, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(train(1, 1.0, 1e-8), released, rtol=1e-4, atol=1e-3)


def test_small_updates_are_lost_in_bfloat16():
    weights = torch.linspace(0.0161, 3, 1000).to(torch.bfloat16)
    assert torch.equal(weights + 5e-5, weights)
    assert torch.equal(weights - 5e-5, weights)
    smaller = torch.tensor(0.01, dtype=torch.bfloat16)
    assert smaller + 5e-5 != smaller


def test_mislabelled_curve():
    peak = {alpha: P[Objective.parse({"name": "power", "alpha": alpha}).weight(P.log()).argmax()] for alpha in (0.2, 0.8)}
    assert f"{peak[0.2]:.3f}" == "0.167"
    assert f"{peak[0.8]:.3f}" == "0.444"


def test_condition_of_the_theorem_fails():
    q = P.clone().requires_grad_()
    (slope,) = torch.autograd.grad((-q.log() - (1 - q)).sum(), q)
    value = P * slope
    torch.testing.assert_close(value, P - 1)
    c, d = -value[P <= 0.55].min(), -value[(P >= 0.55) & (P <= 0.95)].max()
    assert c > 10 * d


@pytest.mark.parametrize("spec", ["nll", "neg_p", {"name": "power", "alpha": 10}])
def test_sign_of_the_lemma(spec):
    objective, target = Objective.parse(spec), 2
    logits = torch.tensor([0.3, -1.0, 1.2, 0.5], dtype=torch.float64, requires_grad=True)
    logp = logits.log_softmax(0)
    (gradient,) = torch.autograd.grad(objective(logp[target]), logits)
    p, delta = logp.exp().detach(), torch.eye(4, dtype=torch.float64)[target]
    torch.testing.assert_close(gradient, -objective.gradient_weight(logp[target].detach()) * (delta - p))
    torch.testing.assert_close(-gradient[target], objective.weight(logp[target].detach()))

"""README and docs are true: tables, snippets, links and file map, and the recipes in `configs/`."""

import json
import math
import re
import runpy
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainingArguments

from bl_trainer import Objective, Threshold
from bl_trainer.cli import VERBS
from bl_trainer.diagnosis.options import DiagnoseArguments
from bl_trainer.evaluation import EvaluateArguments
from bl_trainer.objectives.contract import STATISTICS
from bl_trainer.objectives.objective import OBJECTIVES
from bl_trainer.objectives.pricing import METRICS
from bl_trainer.objectives.published import PUBLISHED
from bl_trainer.prepare import PrepareArguments
from bl_trainer.prepare.sources import SETS
from bl_trainer.recipe import DATACLASSES
from bl_trainer.recipe.parser import Parser
from bl_trainer.recipe.recipe import Recipe
from bl_trainer.sweep.plan import OWN_KEYS, Plan
from bl_trainer.sweep.rulers import RULERS
from bl_trainer.sweep.verb import SweepArguments
from bl_trainer.training.trainer import BLTrainer
from ways import train

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))}
README = PAGES["README.md"]
P = torch.linspace(0.0213, 0.9787, 49, dtype=torch.float64)  # on no threshold


def blocks(language, *pages):
    return [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)]


def table(header, page):
    """The rows of a page's table whose first header cell is `header`, as lists of cells."""
    text = PAGES[page]
    lines = text[text.index(f"| {header} |") :].splitlines()
    rows = []
    for line in lines[2:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def evaluate(formula, **values):
    return eval(formula.replace("^", "**").replace("·", "*"), {"log": torch.log, "__builtins__": {}}, {"p": P, **values})


@pytest.mark.parametrize("page", ["README.md", "docs/guide/objectives.md"])
def test_table_of_objectives(page):
    rows = table("objective", page)
    assert [re.match(r"`(\w+)`", row[0])[1] for row in rows] == [name for name in OBJECTIVES if name not in PUBLISHED]
    for cells in rows:
        name = re.match(r"`(\w+)`", cells[0])[1]
        parameters = {"power": {"alpha": 0.7}, "log_one_minus_p": {"epsilon": 1e-3}}.get(name, {})
        objective = Objective.parse({"name": name, **parameters})
        given = {"progress": 0.7, "entropy": torch.full_like(P, 0.3)}
        values = {**parameters, **({"a": (0.5 + 4.5 * 0.4) * math.exp(-0.3)} if name == "anneal" else {})}
        torch.testing.assert_close(objective(P.log(), **given), evaluate(cells[1], **values))
        torch.testing.assert_close(objective.weight(P.log(), **given), evaluate(cells[2], **values).expand_as(P))


# Cost of a kept token and which tokens are kept, as the paper's repository writes them (paper, section 3; its trainer)
PAPER = {
    "original": (lambda logp: -logp, lambda p, q: p >= 0),
    "logp": (lambda logp: -logp, lambda p, q: p >= 0),
    "p": (lambda logp: -logp.exp(), lambda p, q: p >= 0),
    "GeneralFamily": (lambda logp, a: (1 - (a * logp).exp()) / a, lambda p, q: p >= 0),
    "convexity": (lambda logp, a: -(a * logp).exp() / a, lambda p, q: p >= 0),
    "OnlyTopP": (lambda logp, a: -logp.exp(), lambda p, q: p >= q),
    "OnlyBottomP": (lambda logp, a: -logp.exp(), lambda p, q: p <= q),
    "OnlyTopLogP": (lambda logp, a: -logp, lambda p, q: p >= q),
    "OnlyBottomLogP": (lambda logp, a: -logp, lambda p, q: p <= q),
    "UnlikehoodTop": (lambda logp, a: (1 - logp.exp() + 1e-3).log(), lambda p, q: p >= q),
    "UnlikehoodBottom": (lambda logp, a: (1 - logp.exp() + 1e-3).log(), lambda p, q: p <= q),
}


def test_map_of_the_papers_spellings():
    seen = set()
    for spellings, recipe in table("`objective_trans`", "docs/guide/objectives.md"):
        recipe = yaml.safe_load(recipe.strip("`"))
        objective, threshold = Objective.parse(recipe["objective"]), Threshold.parse(recipe["threshold"])
        assert threshold.normalize == "kept"
        for spelling in re.findall(r"`([^`]+)`", spellings):
            name, _, number = spelling.partition("-")
            seen.add(name)
            cost, keep = PAPER[name]
            logp = P.log().requires_grad_()
            expected = cost(logp, float(number)) if number else cost(logp)
            (slope,) = torch.autograd.grad(expected.sum(), logp)
            torch.testing.assert_close(objective.gradient_weight(P.log()), -slope)
            difference = objective(P.log()) - expected  # a constant at most, which has no gradient
            torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-12, rtol=0)
            assert torch.equal(threshold.keep(P.log()), keep(P.log().exp(), float(number or 0)))
    assert seen == PAPER.keys()


def test_yaml_snippets():
    known = Parser(DATACLASSES).known
    guides = [f"docs/guide/{name}.md" for name in ("training", "objectives", "composing", "thresholds", "your-own-objective")]
    for block in blocks("yaml", "README.md", *guides):
        for line in block.splitlines():
            ((key, value),) = yaml.safe_load(line).items()
            assert key in known, line
            if key == "objective" and "my_" not in line:
                Objective.parse(value)
            if key == "threshold":
                Threshold.parse(value)


def test_python_snippets(monkeypatch, checkpoint, text_data, tmp_path):
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python", "README.md")
    power, gated = blocks("python", "docs/guide/your-own-objective.md")
    (weights,) = blocks("python", "docs/guide/objectives.md")
    namespace = {"torch": torch}
    exec(power + gated, namespace)
    logp = P.log()
    torch.testing.assert_close(namespace["power"](logp, 3), (1 - P**3) / 3)
    assert namespace["gated"](logp, torch.ones_like(logp)).shape == logp.shape
    exec(weights, {"logp": logp, "entropy": torch.ones_like(logp)})
    # The first screen, with a model and a data set that are here
    example = example.replace("Qwen/Qwen2.5-1.5B", str(checkpoint)).replace(
        'output_dir="out"', 'output_dir="out", use_cpu=True, bf16=False, report_to="none", max_steps=1'
    )
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or text_data)
    exec(example, namespace)
    assert isinstance(namespace["trainer"], BLTrainer)
    assert namespace["trainer"].state.global_step == 1
    assert asked == [(("trl-lib/Capybara",), {"split": "train"})]


def test_tables_of_names():
    assert [row[0].strip("`") for row in table("statistic", "docs/guide/your-own-objective.md")] == list(STATISTICS)
    named = set(re.findall(r"`(\w+)`", " ".join(row[0] for row in table("metric", "docs/reference/metrics.md"))))
    assert named == {*METRICS, "loss", "eval_perplexity"}


def test_table_of_diagnose_options():
    assert [row[0].strip("`-") for row in table("option", "docs/guide/diagnose.md")] == [
        f.name for f in fields(DiagnoseArguments)
    ]


def test_table_of_evaluate_options():
    assert [row[0].strip("`-") for row in table("option of `evaluate`", "docs/guide/evaluate.md")] == [
        f.name for f in fields(EvaluateArguments)
    ]


def test_tables_of_data():
    page = "docs/paper/data.md"
    options = [row[0].strip("`-") for row in table("option of `prepare-data`", page)]
    assert options == [f.name for f in fields(PrepareArguments)[1:]]
    assert [row[0].strip("`") for row in table("name", page)] == list(SETS)
    for name, what, *_ in table("name", page):
        assert all(part.hub in what for part in SETS[name.strip("`")].parts)


def test_tables_of_sweeps():
    page = "docs/guide/sweep.md"
    assert [row[0].strip("`-") for row in table("option of `sweep`", page)] == [f.name for f in fields(SweepArguments)]
    keys = [key for row in table("key of a sweep file", page) for key in re.findall(r"`(\w+)`", row[0])]
    assert sorted(keys) == sorted(OWN_KEYS)
    (rulers,) = [row[1] for row in table("key of a sweep file", page) if row[0] == "`rank_by`"]
    assert set(RULERS) <= set(re.findall(r"`(\w+)`", rulers))


def test_sweep_file_is_read(tmp_path):
    (given,) = [block for block in blocks("yaml", "docs/guide/sweep.md") if block.startswith("arms:")]
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "sweep.yaml").write_text(given.replace("data/test.jsonl", str(tmp_path / "test.jsonl")))
    keys = ["--model_name_or_path", "org/model", "--dataset_name", "org/data", "--output_dir", str(tmp_path / "out")]
    recipe = Recipe.read([*keys, "--use_cpu", "true", "--bf16", "false"])
    assert Plan.read(recipe, str(tmp_path / "sweep.yaml"), tmp_path / "out-sweep").count == 27
    (short,) = blocks("yaml", "docs/guide/sweep-presets.md")
    (tmp_path / "short.yaml").write_text(short)
    assert len(Plan.read(recipe, str(tmp_path / "short.yaml"), tmp_path / "short").points()) == 6


def test_recipe_keys_in_the_text_exist():
    known = {*Parser(DATACLASSES).known, *TrainingArguments.__dataclass_fields__}
    ours, theirs = ("README.md", "docs/guide/", "docs/reference/ref"), ("docs/guide/recipes.md", "docs/guide/adapters/")
    guides = [text for page, text in PAGES.items() if page.startswith(ours) and not page.startswith(theirs)]
    for key in re.findall(r"`(\w+): ", "".join(guides)):
        assert key in known | {"normalize", "objective", "weight", "train", "env", *OWN_KEYS}, key


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_in_configs(path, tmp_path, monkeypatch):
    monkeypatch.setattr("bl_trainer.recipe.rules.find_spec", lambda name: True)
    Recipe.read(["--config", str(path), "--output_dir", str(tmp_path / "out"), "--use_cpu"])


def test_file_map_and_commands():
    files = PAGES["docs/developing/architecture.md"]
    paths = re.findall(r"^([\w/.]+)  +\S", files, re.MULTILINE)
    assert {"bl_trainer/training/", "scripts/", "studies/", "tools/", "tests/"} <= set(paths)
    for path in paths:
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page, text in PAGES.items():
        for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", text, re.MULTILINE):
            assert (target[0] or target[1]) in targets, (page, target)


def commands():
    """(page, words) of each shell command of README and docs."""
    for page in PAGES:
        for block in blocks("bash", page):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, shlex.split(line, comments=True)


def verb_of(words):
    """The verb of bl_trainer that a command starts, and its arguments; None if another program."""
    for place, word in enumerate(words):
        script = re.fullmatch(r"scripts/(\w+)\.py", word)
        if script or word in ("bl_trainer", "bl-trainer"):
            verb, *rest = words[place + (not script) :]
            return script[1].replace("_", "-") if script else verb, rest
    return None, []


def test_commands_are_written_right():
    """Verbs, options and files of the repository exist; the tests of each verb run it."""
    reference = PAGES["docs/reference/cli.md"]
    sections = {verb: re.search(rf"^## {verb}\n(.*?)(?=^## |\Z)", reference, re.M | re.S)[1] for verb in VERBS}
    options = {verb: set(re.findall(r"--([\w-]+)", text)) for verb, text in sections.items()}
    seen = set()
    for page, words in commands():
        for word in words:
            if re.match(r"(configs|examples|scripts|studies|tools|benchmarks)/", word):
                assert (ROOT / word).exists(), (page, word)
        verb, arguments = verb_of(words)
        if verb is None or verb == "quickstart":
            continue
        seen.add(verb)
        known = options[verb] | (options["train"] if verb in ("diagnose", "sweep") else set())
        given = {found[1] for word in arguments if (found := re.fullmatch(r"--([\w-]+)(=.*)?", word))}
        assert given <= known | {"help"}, (page, words)
    assert seen == set(VERBS)


def test_figures_are_the_measured_ones():
    included = re.findall(r"^--8<-- \"(.*)\"$", "\n".join(PAGES.values()), re.MULTILINE)
    for path in included:
        assert (ROOT / path).exists(), path
    tables = [path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")]
    assert tables
    assert set(tables) <= set(included)


def test_figure_is_the_scripts(tmp_path):
    script = runpy.run_path(str(ROOT / "tools" / "plot_weights.py"))
    script["main"](str(tmp_path / "weights.svg"))
    assert (tmp_path / "weights.svg").read_bytes() == (ROOT / "docs" / "weights.svg").read_bytes()


def test_page_of_objectives(tmp_path, checkpoint):
    script = runpy.run_path(str(ROOT / "tools" / "objectives_page.py"))
    script["main"](str(tmp_path))
    for name in ("objectives.md", "objectives.svg"):
        assert (tmp_path / name).read_bytes() == (DOCS / "reference" / name).read_bytes(), f"{name}: run `make figures`"
    page = (DOCS / "reference" / "objectives.md").read_text()
    specs = [yaml.safe_load(block)["objective"] for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)]
    assert [spec if isinstance(spec, str) else spec["name"] for spec in specs] == list(OBJECTIVES)
    for spec in specs:
        required = {key: 0.5 for key, value in spec.items() if value == "..."} if isinstance(spec, dict) else {}
        Objective.parse({**spec, **required} if isinstance(spec, dict) else spec)
    for name in PUBLISHED:
        assert re.search(rf"### {name}\n.*?Source: https://arxiv.org/abs/\d{{4}}\.\d{{5}}", page, re.DOTALL), name
        assert f"`{name}`" in PAGES["docs/guide/objectives.md"]


def test_page_of_the_loss_head(tmp_path):
    script = runpy.run_path(str(ROOT / "tools" / "loss_head_page.py"))
    script["main"](str(tmp_path))
    made, page = ((folder / "loss-head.md").read_text() for folder in (tmp_path, DOCS / "reference"))
    assert "| Llama | ✓ | ✓ | ✓ |" in made
    with_versions = re.compile(r"^With transformers .*:$", re.MULTILINE)
    if with_versions.findall(made) == with_versions.findall(page):  # others refuse other models
        assert made == page, "run `python tools/loss_head_page.py`"


def test_page_of_noisy_rows(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "noise_rows_page.py"))["main"](str(tmp_path))
    made, page = ((folder / "noise-rows.md").read_text() for folder in (tmp_path, DOCS / "results"))
    assert made == page, "run `python tools/noise_rows_page.py`"


def test_column_of_a_reference_is_made_as_the_page_says(tmp_path, checkpoint, tokenizer, monkeypatch):
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "reference" / "objectives.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-data").mkdir()
    row = {
        "prompt": [{"role": "user", "content": "one and two"}],
        "completion": [{"role": "assistant", "content": "is three"}],
    }
    for split in ("train", "test"):
        (tmp_path / "my-data" / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    exec(snippet.replace("my-base", str(checkpoint)).replace("my-data", "./my-data"), {})
    data = Dataset.from_json("with-reference/train.jsonl")
    assert data[0]["labels"][-9:] == data[0]["input_ids"][-9:]  # with the end token
    assert {*data[0]["labels"][:-9]} == {-100}
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    trainer = train(BLTrainer, tokenizer, data, tmp_path, model=model, objective="psft", per_device_train_batch_size=1)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(-1, rel=1e-5)  # the ratio to the model itself
    assert trainer.state.log_history[0]["gradient_weight"] == pytest.approx(1, rel=1e-5)


def test_the_worked_example_is_read(tmp_path):
    text = (DOCS / "guide" / "worked-example.md").read_text()
    (sweep,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (tmp_path / "test.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "sweep.yaml").write_text(sweep.replace("continuum/mid-fact-30/test.jsonl", str(tmp_path / "test.jsonl")))
    keys = ["--model_name_or_path", "org/model", "--dataset_name", "org/data", "--output_dir", str(tmp_path / "out")]
    plan = Plan.read(Recipe.read([*keys, "--use_cpu", "true", "--bf16", "false"]), str(tmp_path / "sweep.yaml"), tmp_path)
    assert f"{plan.count} runs: {len(plan.points())} settings" in text
    for script in re.findall(r"(?:scripts|studies)/\w+\.py", text):
        assert (ROOT / script).exists()


def anchors(text):
    """The anchors of a page's headings, as the site makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project(page):
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", PAGES[page]):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text()), (target, anchor)


def test_every_page_is_on_the_site():
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    listed = [page for part in site["nav"] for page in ([part] if isinstance(part, str) else next(iter(part.values())))]
    assert sorted(f"docs/{page}" for page in listed) == sorted(page for page in PAGES if page != "README.md")


def test_description_of_the_package_has_no_link_that_leads_nowhere():
    """It is README.md, read where the repository's files are not."""
    description = runpy.run_path(str(ROOT / "setup.py"))["description"]
    relative = r"\]\((?!https?://|#)"
    assert re.search(relative, README)
    for address in ("", "https://example.org/raw/main/"):
        made = description(README, address)
        assert not re.search(relative, made)
        assert "all documentation" in made
        assert "](https://arxiv.org/abs/2510.00526)" in made
        assert ("![W(p) of the objectives](https://example.org/raw/main/docs/weights.svg)" in made) == bool(address)
    assert "![" not in description(README, "")


def test_readme_fits_a_screen():
    assert len(README.splitlines()) <= 150


def test_reference_of_commands(tmp_path):
    runpy.run_path(str(ROOT / "tools" / "reference_pages.py"))["main"](str(tmp_path))
    assert (tmp_path / "cli.md").read_text() == PAGES["docs/reference/cli.md"], "run `make figures`"


@pytest.mark.parametrize(
    ("text", "fault"),
    [("This goes on.", "write resume, or continue"), (" ".join(["word"] * 29) + ".", "29 words in a sentence")],
)
def test_prose_check_finds(text, fault, tmp_path, capsys):
    prose = runpy.run_path(str(ROOT / "tools" / "prose.py"))
    notebook = {"cells": [{"cell_type": "markdown", "source": [text]}]}
    documented = (
        f'class A:\n    def b(self):\n        """Return b.\n\n        Args:\n            c: A.\n            d: {text}"""'
    )
    sources = {"a.md": text, "a.py": f"raise ValueError({text!r})", "a.j2": f"<p>{text}</p>", "c.py": documented}
    sources["a.ipynb"] = json.dumps(notebook)
    for name, source in sources.items():
        (tmp_path / name).write_text(source)
        assert prose["main"]([tmp_path / name]) == 1
        assert fault in capsys.readouterr().out
    (tmp_path / "b.md").write_text(f"Training stops.\n\n```\n{text}\n```\n\nWrite `{text}`.")
    (tmp_path / "b.py").write_text(
        documented.replace("b(", "_b(") + f'\n\ndef c():\n    """Return c.\n\n    As:\n\n        {text}"""'
    )
    assert prose["main"]([tmp_path / "b.md", tmp_path / "b.py"]) == 0

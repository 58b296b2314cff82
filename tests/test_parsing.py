"""A start parses the recipe's objective once, on the whole path of a verb: recipe, rules, configuration, trainer, report."""

import pytest

from bl_trainer import Objective
from bl_trainer.cli import main
from bl_trainer.objectives import objective as parsing
from conftest import write_recipe


def of_its_user(logp):
    return -logp


SPEC = f"{__name__}:of_its_user"


@pytest.fixture
def tried(monkeypatch):
    """Names of the objectives whose functions were tried."""
    names, check = [], parsing.check_contract

    def counted(objective):
        names.append(objective.name)
        check(objective)

    monkeypatch.setattr(parsing, "check_contract", counted)
    return names


@pytest.mark.parametrize("verb", ["train", "diagnose"])
def test_a_verb_tries_a_users_function_once(verb, checkpoint, data_folder, tmp_path, tried):
    changes = {"objective": SPEC, "threshold": 0.1, "max_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    path = write_recipe(tmp_path, checkpoint, data_folder, **changes)
    report = ["--report", str(tmp_path / "report")] if verb == "diagnose" else []
    main([verb, "--config", str(path), *report])
    assert tried.count(SPEC) == 1


@pytest.mark.parametrize(
    "spec",
    [SPEC, '{"name": "power", "alpha": 2}', {"name": "neg_p", "mix": {SPEC: 0.5}, "floor": 0.1, "special_tokens": "nll"}],
)
def test_what_was_parsed_is_read_without_trying_it(spec, tried):
    parsed = Objective.parse(spec)
    tried.clear()
    assert Objective.read(spec) == Objective.read(parsed.to_dict()) == Objective.read(parsed) == parsed
    assert not tried

"""A folder of results: what other evaluations write meanwhile stays, and results of anything else are not taken for these."""

import json
import threading
from importlib.metadata import version

import pytest

from bl_trainer.errors import RecipeError
from bl_trainer.evaluation.options import Checkpoint, EvaluateArguments
from bl_trainer.evaluation.results import Answered, Results, check_items
from bl_trainer.evaluation.table import table

ITEMS = 12


def open_results(tmp_path, models, tasks, **others):
    for name in models:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    options = EvaluateArguments(model=[*models], tasks=[*tasks], output=str(tmp_path / "out"), **others)
    return Results(options, [Checkpoint(name, str(tmp_path / name), None) for name in models])


def found(task, value):
    """What the harness finds: item i is right if i < value."""
    samples = [
        {
            "doc_id": i, "doc_hash": str(i), "filtered_resps": ["a"], "resps": [["a"]], "arguments": [("q", {})],
            "target": "a", "filter": "none", "metrics": ["acc"], "acc": float(i < value),
        }
        for i in range(ITEMS)
    ]  # fmt: skip
    scores = {"acc,none": value / ITEMS, "acc_stderr,none": "N/A"}
    rest = {"configs": {task: {}}, "higher_is_better": {}, "n-shot": {task: 0}, "versions": {task: 1}}
    return {"samples": {task: samples}, "results": {task: scores}, **rest}


def add(results, model, task, value):
    (checkpoint,) = (Checkpoint(name, name, None) for name in results.prints if name == model)
    results.add(checkpoint, task, [Answered(None, results.options, found(task, value))], chat=False)


def stored(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


def keys(tmp_path):
    return sorted((entry["checkpoint"], entry["task"]) for entry in stored(tmp_path)["evaluations"])


def test_evaluations_at_the_same_time_keep_each_others_entries_and_differences(tmp_path):
    one = open_results(tmp_path, ["a", "b"], ["x"])
    two = open_results(tmp_path, ["a", "b"], ["y"])
    for model, value in (("a", 3), ("b", 6)):
        add(one, model, "x", value)
        add(two, model, "y", value + 3)
    one.write()
    assert keys(tmp_path) == [(model, task) for model in "ab" for task in "xy"]
    differences = {each["task"]: each for each in stored(tmp_path)["differences"]}
    assert {task: each["difference"] for task, each in differences.items()} == {"x": 0.25, "y": 0.25}
    assert [each["task"] for each in one.differences()] == ["x"]  # which its own table shows
    again = open_results(tmp_path, ["a", "b"], ["x"], overwrite=True)
    add(again, "a", "x", 3)
    add(again, "b", "x", 9)
    assert {each["task"]: each["difference"] for each in stored(tmp_path)["differences"]} == {"x": 0.5, "y": 0.25}


def test_scores_of_different_versions_are_told(tmp_path, monkeypatch):
    results = open_results(tmp_path, ["a", "b"], ["x", "y"])
    add(results, "a", "x", 3)
    add(results, "a", "y", 3)
    add(results, "b", "y", 3)
    monkeypatch.setattr("bl_trainer.evaluation.results.version", lambda name: "99" if name == "lm_eval" else version(name))
    add(results, "b", "x", 6)
    (note,) = stored(tmp_path)["notes"]
    assert note.startswith(f"x was run with different versions of lm_eval ({version('lm_eval')}, 99).")
    assert f"Note: {note}" in table(results)


def test_many_writers_lose_nothing(tmp_path):
    tasks = [f"task{i}" for i in range(8)]
    opened = [open_results(tmp_path, ["a"], [task]) for task in tasks]
    start = threading.Barrier(len(tasks))

    def write(results, task):
        start.wait()
        add(results, "a", task, 5)

    threads = [threading.Thread(target=write, args=each) for each in zip(opened, tasks, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert keys(tmp_path) == [("a", task) for task in tasks]
    assert not list((tmp_path / "out").rglob("*.part"))


def test_other_options_of_the_same_task_meanwhile_are_refused_and_left(tmp_path):
    one, two = (open_results(tmp_path, ["a"], ["x"], limit=limit) for limit in (None, 3))
    add(one, "a", "x", 5)
    before = {path: path.read_text() for path in (tmp_path / "out").rglob("*.json*")}
    with pytest.raises(RecipeError, match=r"holds results of x with other options \(`limit`: None, now 3\)"):
        add(two, "a", "x", 7)
    assert {path: path.read_text() for path in (tmp_path / "out").rglob("*.json*")} == before
    over = open_results(tmp_path, ["a"], ["x"], limit=3, overwrite=True)
    add(over, "a", "x", 7)
    assert [entry["options"]["limit"] for entry in stored(tmp_path)["evaluations"]] == [3]


def test_one_changed_byte_is_another_model(tmp_path):
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "model.safetensors"
    prints = set()
    for place in (0, 5000, 3_000_001, 2**22 - 1):
        content = bytearray(2**22)
        content[place] = 1
        weights.write_bytes(content)
        prints.add(Checkpoint("a", str(tmp_path / "a"), None).fingerprint())
    for name in ("merges.txt", "vocab.json", "modeling.py"):
        (tmp_path / "a" / name).write_text("x")
        prints.add(Checkpoint("a", str(tmp_path / "a"), None).fingerprint())
    assert len(prints) == 7


@pytest.mark.parametrize("changed", ["task.yaml", "base.yaml", "code.py", "rows.jsonl"])
def test_results_depend_on_all_files_of_a_task(changed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    contents = {
        "task.yaml": "include: base.yaml\ntask: x\ndoc_to_target: '/'\n",
        "base.yaml": "process_docs: !function code.read\ndataset_kwargs: {data_files: {test: tasks/rows.jsonl}}\n",
        "code.py": "def read(docs): return docs\n",
        "rows.jsonl": '{"question": "a"}\n',
    }
    for name, content in contents.items():
        (tmp_path / "tasks" / name).write_text(content)
    task = "tasks/task.yaml"
    add(open_results(tmp_path, ["a"], [task]), "a", task, 5)
    open_results(tmp_path, ["a"], [task])
    (tmp_path / "tasks" / changed).write_text(contents[changed] + "\n")
    with pytest.raises(RecipeError, match=r"with other options \(`files`"):
        open_results(tmp_path, ["a"], [task])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"task: [\n", "Cannot read the task file .*task.yaml: line 2: "),
        (b"task: \xff\n", "Cannot read the task file .*task.yaml: .*invalid start byte"),
        (b"task: \0\n", "Cannot read the task file .*task.yaml: unacceptable character"),
    ],
)
def test_task_file_that_cannot_be_read(content, message, tmp_path):
    (tmp_path / "task.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        EvaluateArguments().deciding(str(tmp_path / "task.yaml"))


# --- Files of items belong to one task's results ---


def grouped(value, items):
    """What the harness finds of a group `grp` of one task."""
    one = found("grp_a", value)
    one["samples"]["grp_a"] = one["samples"]["grp_a"][:items]
    one["results"] = {"grp_a": {"acc,none": value / items}, "grp": {"acc,none": value / items}}
    return {**one, "groups": {"grp": {}}}


def add_group(results, values, items=6):
    for model, value in zip(results.prints, values, strict=True):
        answered = [Answered(None, results.options, grouped(value, items))]
        results.add(Checkpoint(model, model, None), "grp", answered, chat=False)


def test_a_member_with_other_options_does_not_replace_the_items_of_its_group(tmp_path):
    add_group(open_results(tmp_path, ["a", "b"], ["grp"], limit=6), [6, 0])
    message = r"holds results of grp on the items of grp_a, as grp_a has them, with other options \(`limit`: 6, now 12\)"
    with pytest.raises(RecipeError, match=message):
        open_results(tmp_path, ["a", "b"], ["grp_a"], limit=12)
    (difference,) = open_results(tmp_path, ["a", "b"], ["grp"], limit=6).differences()
    assert (difference["difference"], difference["items"]) == (-1.0, 6)
    over = open_results(tmp_path, ["a", "b"], ["grp_a"], limit=12, overwrite=True)
    for model, value in (("a", 0), ("b", 12)):
        add(over, model, "grp_a", value)
    assert keys(tmp_path) == [("a", "grp_a"), ("b", "grp_a")]  # nothing is left whose items are gone
    open_results(tmp_path, ["c"], ["grp"], limit=6)  # none of it is there


def test_a_group_with_other_options_does_not_replace_the_items_of_a_member(tmp_path):
    first = open_results(tmp_path, ["a"], ["grp_a"], limit=12)
    add(first, "a", "grp_a", 12)
    before = {path: path.read_text() for path in (tmp_path / "out").rglob("*.json*")}
    group = open_results(tmp_path, ["a"], ["grp"], limit=6)
    (tmp_path / "a" / "config.json").write_text('{"name": "a"}')
    options = EvaluateArguments(**{**vars(group.options), "model": [str(tmp_path / "a")]})
    check_items(options, {"grp": ["grp_a"]})  # of another checkpoint
    with pytest.raises(RecipeError, match=r"holds results of grp_a on the items of grp_a, as grp has them, with other options"):
        add_group(group, [6])
    assert {path: path.read_text() for path in (tmp_path / "out").rglob("*.json*")} == before
    over = open_results(tmp_path, ["a"], ["grp"], limit=6, overwrite=True)
    add_group(over, [6])
    assert keys(tmp_path) == [("a", "grp")]


def test_what_a_loaded_group_would_replace_is_told_before_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(open_results(tmp_path, ["a"], ["grp_a"], limit=12), "a", "grp_a", 12)
    options = {"model": ["a"], "output": "out", "limit": 6}
    check_items(EvaluateArguments(tasks=["grp"], **options), {"grp": ["grp_b"]})
    check_items(EvaluateArguments(tasks=["grp"], overwrite=True, **options), {"grp": ["grp_a"]})
    check_items(EvaluateArguments(tasks=["grp"], **{**options, "limit": 12}), {"grp": ["grp_a"]})
    with pytest.raises(RecipeError, match=r"results of grp_a on the items of grp_a, as grp has them"):
        check_items(EvaluateArguments(tasks=["grp"], **options), {"grp": ["grp_a"]})
    with pytest.raises(RecipeError, match=r"`--tasks grp_a,grp`: both would write the items of the task 'grp_a'"):
        check_items(EvaluateArguments(tasks=["grp_a", "grp"], **{**options, "limit": 12}), {"grp": ["grp_a"]})


def test_two_files_that_name_one_task_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tasks = [f"{name}/t.yaml" for name in "abc"]
    for task, content in zip(tasks, ("task: t\n", "include: base.yaml\n", "task: u\n"), strict=True):
        (tmp_path / task).parent.mkdir()
        (tmp_path / task).write_text(content)
    (tmp_path / "b" / "base.yaml").write_text("task: t\n")
    message = r"`--tasks a/t.yaml,b/t.yaml`: both would write the items of the task 't'. Evaluate each by a command of its own"
    with pytest.raises(RecipeError, match=message):
        open_results(tmp_path, ["m"], tasks)
    with pytest.raises(RecipeError, match=r"`--tasks t,a/t.yaml`: both would write"):
        open_results(tmp_path, ["m"], ["t", "a/t.yaml"])
    first = open_results(tmp_path, ["m"], ["a/t.yaml", "c/t.yaml"])
    first.add(Checkpoint("m", "m", None), "a/t.yaml", [Answered(None, first.options, found("t", 5))], chat=False)
    with pytest.raises(RecipeError, match=r"holds results of a/t.yaml on the items of t, as b/t.yaml has them, with other opt"):
        open_results(tmp_path, ["m"], ["b/t.yaml"])
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "t.yaml").write_text("task: t\n")
    open_results(tmp_path, ["m"], ["d/t.yaml"])  # the same task at another path

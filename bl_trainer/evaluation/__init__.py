"""The evaluate verb: checkpoints on the tasks of lm-evaluation-harness and on data of one's own, compared item by item."""

import functools
from collections.abc import Callable
from typing import Any

from .._util.process import is_first
from .items import read_items
from .options import EvaluateArguments
from .results import Answered, Results
from .scores import paired_difference
from .table import table

__all__ = ["EvaluateArguments", "evaluate", "paired_difference", "read_items"]


def evaluate(options: EvaluateArguments) -> dict[str, Any]:
    """Run every task on every checkpoint, but for what `output` holds already; print a table, return what results.json holds.

    Raises RecipeError on what can't be evaluated. Of several processes the first one alone has the results.
    """
    results = run_tasks(options, say=functools.partial(print, flush=True))
    if is_first():
        print(table(results))
    return results.content()


def run_tasks(options: EvaluateArguments, say: Callable[[str], None] = lambda line: None) -> Results:
    """Run every task on every checkpoint, but for what `output` holds already; `say` takes a line after each.

    Raises RecipeError on what can't be evaluated.
    """
    options.check()
    checkpoints = options.checkpoints()
    results = Results(options, checkpoints)
    missing = {
        checkpoint.name: [task for task in options.tasks if not results.has(checkpoint, task)] for checkpoint in checkpoints
    }
    from .harness import Tasks, find_model, load_model, run

    for checkpoint in checkpoints:
        if missing[checkpoint.name]:
            find_model(checkpoint)
    tasks = Tasks(options)
    loaded = {task: tasks.load(task) for task in options.tasks if any(task in names for names in missing.values())}
    for checkpoint in checkpoints:
        lm = load_model(checkpoint, options) if missing[checkpoint.name] else None
        for task in missing[checkpoint.name]:
            ways = [(at, own, *run(lm, loaded[task], tasks, own)) for at, own in options.decodings()]
            answered = [Answered(at, own, found) for at, own, found, _ in ways if found is not None]
            if answered:  # in no process but the first
                chat = ways[0][-1]
                results.add(checkpoint, task, answered, chat)
                say(f"{checkpoint.name}, {task}: chat template {'' if chat else 'not '}applied.")
        del lm  # before the next one is loaded
    if is_first():
        results.write()
    return results

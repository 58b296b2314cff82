"""The evaluate verb: checkpoints on the tasks of lm-evaluation-harness, on data of one's own, and compared item by item."""

from typing import Any

from ..parser import RecipeError
from .options import EvaluateArguments
from .results import Results, paired_difference, read_items, table

__all__ = ["EvaluateArguments", "evaluate", "paired_difference", "read_items"]


def evaluate(options: EvaluateArguments) -> dict[str, Any] | None:
    """Run every task on every checkpoint, but for what `output` holds already, and print the table.

    Returns what results.json holds, in the first process alone. Raises RecipeError on what can't be evaluated.
    """
    options.check()
    checkpoints = options.checkpoints()
    results = Results(options, checkpoints)
    missing = [(checkpoint, [task for task in options.tasks if not results.has(checkpoint, task)]) for checkpoint in checkpoints]
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise RecipeError(f"Evaluation needs lm-evaluation-harness ({error}). Run `pip install '.[evaluation]'`.") from error
    from .harness import Tasks, load_model, run

    tasks = Tasks(options)
    loaded = {name: tasks.load(name) for name in {name: None for _, names in missing for name in names}}
    if not options.overwrite and not loaded:
        print("All of it is there already.")
    is_first = True
    for checkpoint, names in missing:
        lm = load_model(checkpoint, options) if names else None
        for name in names:
            found, chat = run(lm, loaded[name], tasks)
            is_first = found is not None
            if found is not None:
                results.add(checkpoint, name, found, chat)
                print(f"{checkpoint.name}, {name}: chat template {'applied' if chat else 'not applied'}.", flush=True)
        del lm
    if not is_first:
        return None
    results.write()
    print(table(results))
    return {"evaluations": results.entries, "differences": results.differences()}

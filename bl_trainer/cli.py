"""The verbs: `bl-trainer VERB`, or on several devices `accelerate launch -m bl_trainer VERB`.

Importing it costs neither torch nor TRL, so that `bl-trainer --help` and a mistyped verb are answered at once.
"""

import copy
import os
import signal
import sys
import time
import traceback
from typing import Any

from . import __version__
from ._util.process import is_first_here, tell_launcher
from ._util.text import nearest, sentence
from .errors import BLError, DependencyError, RecipeError

VERBS = {
    "diagnose": "Measure what the model already knows of the training data, without training.",
    "train": "Fine-tune a model on a recipe, with any objective.",
    "sweep": "Compare objectives and learning rates on the same metrics.",
    "evaluate": "Score checkpoints on tasks, and compare them item by item.",
    "merge": "Merge an adapter into its base model.",
    "prepare-data": "Prepare a data set of the paper.",
    "convert": "Rewrite a recipe of an older TRL, or of another trainer.",
    "score": "Rank an objective among others, on small models and tasks with known answers.",
}

HELP = f"""usage: bl-trainer VERB [OPTION ...]

Supervised fine-tuning with objectives f(p) of the target token's probability, on TRL.

Verbs:
{chr(10).join(f"  {verb:<14}{summary}" for verb, summary in VERBS.items())}

Options:
  -h, --help    Show this help; `bl-trainer VERB --help` shows a verb's options and recipe keys.
  --version     Show the version.

Examples:
  bl-trainer diagnose --config recipe.yaml --report out/diagnosis
  bl-trainer diagnose --model org/model --data train.jsonl --report out/diagnosis
  bl-trainer train --config recipe.yaml --objective neg_p --learning_rate 1e-5
  bl-trainer sweep --config recipe.yaml --sweep out/diagnosis/sweep.yaml
  bl-trainer evaluate --model out/model --tasks gsm8k --output out/evaluation
  bl-trainer merge out/model --output out/model-merged
  bl-trainer prepare-data figfont --output data/figfont
  bl-trainer convert old.yaml --output recipe.yaml
  bl-trainer score my_losses:my_objective --output out/score

On several devices:
  accelerate launch -m bl_trainer train --config recipe.yaml
"""


def train(argv: list[str]) -> None:
    """Train the recipe that `argv` names: `--config recipe.yaml --any_key value ...`.

    A mistake in the recipe ends in one sentence on stderr and exit code 2, before the model loads and with nothing written.
    """
    refuse_wrong_keys(argv, options="TrainArguments")
    import torch

    recipe, plan, trainer = _made_ready(argv)
    torch.set_flush_denormal(True)  # weights such as p^10 are often subnormal, on which a CPU's products are slow
    try:
        trainer.train(resume_from_checkpoint=plan)
        if trainer.was_terminated:
            _say_terminated(trainer)
            sys.exit(128 + signal.SIGTERM)
        if trainer.is_left:
            trainer.accelerator.print(f"{recipe.training.output_dir} is left as it is.")
        else:
            _save(trainer, recipe, argv)
    except Exception as error:
        fail(error, recipe, anywhere=True, traced=trainer.has_begun)
    end(trainer)


def _made_ready(argv: list[str]) -> tuple[Any, Any, Any]:
    """Return the recipe, what to resume from, and the trainer; a mistake ends the process."""
    from .recipe.recipe import Recipe
    from .training.metrics_log import MetricsLog
    from .training.preview import TrainArguments, preview
    from .training.trainer import BLTrainer

    recipe: Any = None
    try:
        recipe = Recipe.read(argv, options=TrainArguments)
        recipe.options.check()
        plan = recipe.plan_resume()
        train_dataset, eval_dataset = recipe.load_datasets()
        trainer = BLTrainer(
            model=recipe.model.model_name_or_path,
            args=arguments_of(recipe),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=recipe.quantization_config,
            peft_config=recipe.peft_config,
        )
        trainer.recipe = recipe.given
        trainer.add_callback(MetricsLog())
        if recipe.options.show:
            trainer.accelerator.print(preview(trainer, train_dataset, recipe.options.show))
    except Exception as error:  # before the first step, whatever fails is what the recipe says or points to
        fail(error, recipe)
    return recipe, plan, trainer


def refuse_wrong_keys(argv: list[str], verb: str = "train", options: str | None = None) -> None:
    """End with the mistakes of a recipe that its keys and values alone show, before torch loads, and set its `env`.

    `options`: the dataclass of what the verb takes besides.
    """
    from .recipe.fields import fields_of
    from .recipe.reading import read_keys

    try:
        keys = read_keys(argv, verb, fields_of(options) if options else (), tries=True)
        os.environ.update({key: str(value) for key, value in (keys.config.get("env") or {}).items()})  # libraries read it once
    except Exception as error:  # whatever fails is what the recipe says or points to
        fail(error)


def arguments_of(recipe: Any) -> Any:
    """Return the recipe's `training` as the trainer takes it, with all `model_init_kwargs`."""
    arguments = copy.copy(recipe.training)  # `dataclasses.replace` would check, and set DeepSpeed up, once more
    arguments.model_init_kwargs = recipe.model_init_kwargs()
    return arguments


def _save(trainer: Any, recipe: Any, argv: list[str]) -> None:
    """Save the model and its card, push them if the recipe says so, and print the commands for them."""
    from .training.checkpoints import writing
    from .training.next_steps import next_steps

    with writing(recipe.training.output_dir):
        trainer.save_model(recipe.training.output_dir)
    name = recipe.script.dataset_name
    hub_name = None if name is None or os.path.exists(name) else name  # the card links to it
    trainer.create_model_card(dataset_name=hub_name)
    trainer.accelerator.print(f"Model saved to {recipe.training.output_dir}.")
    if recipe.training.push_to_hub:
        trainer.push_to_hub(dataset_name=hub_name)
        trainer.accelerator.print(f"Model pushed to the Hub as {trainer.hub_model_id}.")
    steps = next_steps(recipe.training.output_dir, recipe.given, argv, pushed=recipe.training.push_to_hub)
    trainer.accelerator.print("\n".join(steps))


def _say_terminated(trainer: Any) -> None:
    step, steps = trainer.state.global_step, trainer.state.max_steps
    resumes = "The same command" if trainer.args.resume_from_checkpoint else "With `resume_from_checkpoint: true` the command"
    trainer.accelerator.print(
        f"Stopped by SIGTERM after step {step} of {steps}; checkpoint-{step} is saved. {resumes} resumes from there."
    )
    end(trainer)


def diagnose(argv: list[str]) -> None:
    """Diagnose a recipe, `--config recipe.yaml --report DIR`, or a model and its data, `--model M --data D.jsonl --report DIR`.

    `argv` may also have the other options of `DiagnoseArguments`, and any recipe key.

    A mistake ends in one sentence on stderr and exit code 2, with no report written.
    """
    if "--config" in argv:
        refuse_wrong_keys(argv, "diagnose", "DiagnoseArguments")
    from .diagnosis.options import read_diagnosis
    from .diagnosis.page import write_report
    from .diagnosis.run import Diagnosis
    from .diagnosis.terminal import terminal_summary

    recipe: Any = None
    try:
        recipe = read_diagnosis(argv)
        diagnosis = Diagnosis(recipe)
    except Exception as error:  # before the first batch, whatever fails is what the recipe says or points to
        fail(error, recipe)
    try:
        diagnosis.score()
        report = diagnosis.run() if recipe.options.report else None
        if report is not None and diagnosis.trainer.is_world_process_zero():
            write_report(report, recipe.options.report, diagnosis.scored(), recipe.options.draw)
            print(terminal_summary(report, recipe.options.report, recipe.options.draw))
    except Exception as error:  # of one process alone, perhaps: its rows are read and its batches measured as it goes
        fail(error, recipe, anywhere=True)
    end(diagnosis.trainer)


def sweep(argv: list[str]) -> None:
    """Sweep the recipe that `argv` names: `--config recipe.yaml --sweep sweep.yaml`, and the options of `SweepArguments`.

    A mistake ends in one sentence on stderr and exit code 2, before any arm runs.
    """
    argv = _with_launch(argv)
    refuse_wrong_keys(argv, "sweep", "SweepArguments")
    try:
        from .sweep.verb import sweep as run
    except ImportError as error:
        fail(RecipeError(f"A sweep needs {error.name}. Run `pip install '.[sweep]'`."))
    try:
        run(argv)
    except KeyboardInterrupt:
        print("\nStopped, with all its runs. The same command resumes them.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)


def _with_launch(argv: list[str]) -> list[str]:
    """Return `argv` with `--launch` and what follows it in one, since that begins with dashes as an option of its own does."""
    if "--launch" not in argv[:-1]:
        return argv
    index = argv.index("--launch")
    return [*argv[:index], f"--launch={argv[index + 1]}", *argv[index + 2 :]]


def evaluate(argv: list[str]) -> None:
    """Evaluate checkpoints: `--model PATH --tasks NAME --output DIR`, and the options of `EvaluateArguments`.

    A mistake ends in one sentence on stderr and exit code 2.
    """
    import torch

    from .evaluation import EvaluateArguments
    from .evaluation import evaluate as run

    options: Any = None
    try:
        options = EvaluateArguments.read(argv)
        run(options)
    except KeyboardInterrupt:
        where = options.output if options else None
        print(f"\nStopped. The same command resumes after the tasks that {where} holds.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:  # a mistake is the same in all processes, anything else may be one's own
        fail(error, anywhere=not isinstance(error, RecipeError))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def merge(argv: list[str]) -> None:
    """Merge an adapter into its base: `RUN --output DIR`, and the options of `MergeArguments`.

    A mistake ends in one sentence on stderr and exit code 2, with nothing written.
    """
    from .recipe.parser import Parser
    from .training.merge import MergeArguments
    from .training.merge import merge as run

    classes: Any = [MergeArguments]
    try:
        parser = Parser(classes, prog="bl-trainer merge", allow_abbrev=False)
        if not argv or argv[0].startswith("-"):
            raise RecipeError("No run is named. Write `bl-trainer merge RUN --output DIR`.")
        parser.check(argv[1:])
        options = parser.parse({}, argv[1:])[0]
        options.run = argv[0]
        run(options)
    except Exception as error:
        fail(error)
    print(f"Merged model saved to {options.output}. The Python lines of its README.md generate with it.")


def prepare_data(argv: list[str]) -> None:
    """Prepare a data set of the paper: `NAME --output DIR`, and the options of `PrepareArguments`.

    A mistake ends in one sentence on stderr and exit code 2, with nothing that looks finished.
    """
    from .prepare import PrepareArguments, prepare

    try:
        prepare(PrepareArguments.read(argv))
    except KeyboardInterrupt:
        print("\nStopped. The same command resumes after the files that are finished.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)


def convert(argv: list[str]) -> None:
    """Rewrite a recipe: `OLD.yaml --output NEW.yaml`.

    A mistake ends in one sentence on stderr and exit code 2, with nothing written.
    """
    from .recipe.convert import ConvertArguments
    from .recipe.convert import convert as run

    try:
        said, changed = run(ConvertArguments.read(argv))
    except BLError as error:
        fail(error)
    print(said)
    for what in changed:
        print(f"warning: this changes training: {what}.", file=sys.stderr)


def score(argv: list[str]) -> None:
    """Score an objective: `my_losses:my_objective --output DIR`, and the options of `ScoreArguments`.

    A mistake ends in one sentence on stderr and exit code 2, before any training.
    """
    from .cells.verb import ScoreArguments
    from .cells.verb import score as run
    from .recipe.parser import Parser

    classes: Any = [ScoreArguments]
    parser = Parser(classes, prog="bl-trainer score", allow_abbrev=False)
    try:
        run(ScoreArguments.read(argv, parser))
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        fail(error)


def end(trainer: Any) -> None:
    """Finish the trackers and the process group."""
    # gloo's thread needs the interpreter lock to let go of the last collective's tensors, and teardown, which holds the
    # lock, waits for that thread (torch 2.13): let it go first
    time.sleep(0.2)
    trainer.accelerator.end_training()


def main(argv: list[str] | None = None) -> None:
    """Run the verb that `argv` names, by default the command line's."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if argv and argv[0] == "--version":
        print(f"bl-trainer {__version__}")
        return
    verbs = {verb: globals()[verb.replace("-", "_")] for verb in VERBS}
    if not argv or argv[0] not in verbs:
        wrong = f"unknown verb {argv[0]!r}.{nearest(argv[0], verbs)}" if argv else "no verb."
        write = "Write `bl-trainer VERB ...`, or `accelerate launch -m bl_trainer train --config recipe.yaml`"
        print(f"error: {wrong} {write}; verbs: {', '.join(verbs)}.", file=sys.stderr)
        sys.exit(2)
    if {"-h", "--help"} & {*argv}:
        _show_help(argv[0])
        return
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # so that `objective: my_losses:f` finds a module next to the recipe's user
    from ._util.logs import quieten
    from ._util.requirements import needs_stack

    quieten()
    try:
        with needs_stack(f"bl-trainer {argv[0]}"):
            verbs[argv[0]](argv[1:])
    except DependencyError as error:
        fail(error)


def _show_help(verb: str) -> None:
    from .recipe.help import verb_help

    try:
        print(verb_help(verb, VERBS[verb]), end="")
    except DependencyError as error:
        fail(error)


def fail(error: Exception, recipe: Any = None, anywhere: bool = False, traced: bool = False) -> None:
    """End the process with exit code 2 and one line on stderr; with BL_TRACEBACK=1, or `traced`, where it came from.

    Only one process a machine writes it, unless it may be that process's own (`anywhere`). If `error` is not one of ours, the
    line also says which line of the `recipe`'s local files can't be trained on, if there is one.
    """
    is_ours = isinstance(error, BLError)
    if os.environ.get("BL_TRACEBACK") or (traced and not is_ours):
        traceback.print_exception(error)
    message = _located(error, recipe)
    tell_launcher(message)
    if anywhere or is_first_here():
        if not is_ours:
            fault = recipe.data_fault() if recipe else None
            message = f"{type(error).__name__}: {message} (BL_TRACEBACK=1 shows where)"
            message = f"{fault}; hence {message}" if fault else message
        # a progress bar may stand on the line
        print(f"{chr(10) if anywhere else ''}error: {message}", file=sys.stderr)
    sys.exit(2)


def _located(error: Exception, recipe: Any) -> str:
    """Return the message of an error, with the line of the recipe's local files that it is about, if there is one."""
    if recipe is not None:
        from .tokens.layouts import RowError

        if isinstance(error, RowError):
            return recipe.located(error)
    return str(error) if isinstance(error, RecipeError) else sentence(error)  # several mistakes have a line each

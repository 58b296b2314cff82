"""Write docs/reference/cli.md from the help of every verb: `python tools/reference_pages.py [docs/reference]`."""

import contextlib
import io
import os
import sys
from pathlib import Path

from bl_trainer import cli

OF_RECIPES = ("diagnose", "sweep")  # their help repeats the recipe keys of train's
PAGE = """# Commands and recipe keys

<!-- Written by tools/reference_pages.py (`make figures`) from the help of each verb. -->

`bl-trainer VERB` runs on one device, `accelerate launch -m bl_trainer VERB` on several. In a checkout,
`scripts/` starts train, diagnose, sweep, evaluate and prepare-data without an installation.

```text
{usage}```
"""


def help_of(*argv: str) -> str:
    """Return what `bl-trainer ARGV` prints, 100 columns wide."""
    os.environ["COLUMNS"] = "100"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        cli.main([*argv])
    return printed.getvalue()


def main(folder: str) -> None:
    """Write cli.md into `folder`."""
    page = PAGE.format(usage=help_of("--help"))
    for verb in cli.VERBS:
        text = help_of(verb, "--help")
        if verb in OF_RECIPES:
            own, _, _ = text.partition("\nObjective:\n")
            text = f"{own}\nAnd every key of a recipe: see train.\n"
        page += f"\n## {verb}\n\n```text\n{text}```\n"
    (Path(folder) / "cli.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "docs/reference")

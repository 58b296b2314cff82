"""Execute a notebook and keep its outputs: `python tools/notebook.py [examples/choose_an_objective.ipynb]`.

What it keeps is what the notebook prints and plots. Progress bars and other packages' warnings are left out.
"""

import re
import sys
from pathlib import Path
from typing import Any

OTHERS = re.compile(r"^\[[^\]]*\] \[WARNING\] .*\n", re.MULTILINE)  # DeepSpeed's, which go to stdout


def main(path: Path) -> None:
    """Execute all cells in a new kernel of this Python, and write the notebook in place of itself."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(path.parent)}}).execute()
    tidy(notebook)
    nbformat.write(notebook, path)


def tidy(notebook: dict[str, Any]) -> None:
    """Keep the kernel's name of the metadata, and of the outputs what the notebook itself says."""
    notebook["metadata"] = {"kernelspec": notebook["metadata"]["kernelspec"], "language_info": {"name": "python"}}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = _kept(cell["outputs"])


def _kept(outputs: list[Any]) -> list[Any]:
    kept: list[Any] = []
    for output in outputs:
        if output["output_type"] != "stream":
            kept.append(output)
            continue
        output["text"] = OTHERS.sub("", "".join(output["text"])) if output["name"] == "stdout" else ""
        if output["text"] and kept and kept[-1]["output_type"] == "stream":
            kept[-1]["text"] += output["text"]
        elif output["text"]:
            kept.append(output)
    return kept


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "examples/choose_an_objective.ipynb"))

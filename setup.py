"""The description of the package: README.md, whose links into the repository an index of packages cannot follow."""

import re
from pathlib import Path

from setuptools import setup

REPOSITORY = ""  # where its files are shown, e.g. https://github.com/OWNER/bl_trainer/raw/main/; empty while it has no address


def description(readme: str, repository: str = REPOSITORY) -> str:
    """Return a README with absolute links into the repository; without an address, the text of links and no images."""
    if repository:
        return re.sub(r"\]\((?!https?://|#)", f"]({repository}", readme)
    readme = re.sub(r"!\[[^\]]*\]\((?!https?://)[^)]*\)\n*", "", readme)
    return re.sub(r"\[([^\]]*)\]\((?!https?://|#)[^)]*\)", r"\1", readme)


if __name__ == "__main__":
    text = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")
    setup(long_description=description(text), long_description_content_type="text/markdown")

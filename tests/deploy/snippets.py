"""The examples in the pages of docs/engines. Here and only here.

A page shows an example whole, below a comment that names it:

    <!-- deploy/examples/vllm.yaml -->
    ```yaml
    ```

`python -m tests.deploy.snippets` writes the examples' text into the pages; a test says when that was forgotten.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.deploy.manifests import ROOT

PAGES = ROOT / "docs/engines"

SNIPPET = re.compile(r"<!-- (?P<path>deploy/examples/[\w.-]+) -->\n```yaml\n(?P<text>.*?)```\n", re.DOTALL)


def included(page: str) -> str:
    """The page with every snippet as its example is now. Raises OSError where there is none of that name."""

    def fresh(match: re.Match[str]) -> str:
        return f"<!-- {match['path']} -->\n```yaml\n{(ROOT / match['path']).read_text()}```\n"

    return SNIPPET.sub(fresh, page)


def shown(page: str) -> set[Path]:
    """The examples that a page shows."""
    return {ROOT / match["path"] for match in SNIPPET.finditer(page)}


if __name__ == "__main__":
    for path in sorted(PAGES.glob("*.md")):
        path.write_text(included(path.read_text()))

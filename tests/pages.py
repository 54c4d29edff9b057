"""The python of a page of docs/, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"


def names_of(page: str) -> dict[str, Any]:
    """What its blocks define, run one after another."""
    names: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), flags=re.MULTILINE | re.DOTALL):
        exec(compile(block, page, "exec"), names)
    return names

"""The tables of docs/checkpoints.md are the layouts' own; `make docs` (KIT_WRITE_DOCS=1) writes them anew."""

import os
import re
from pathlib import Path

from kit.checkpoints.registry import FOREIGN, settings_of_target

PAGE = Path(__file__).parents[2] / "docs/checkpoints.md"
BEGIN, END = "<!-- layouts: written by `make docs` -->\n", "<!-- end of layouts -->"


def tables():
    """Return all layouts as one table, and the tensors of each as another."""
    lines = ["| layout | architecture | files, the usual one first | may lack | |", "|---|---|---|---|---|"]
    for name, layout in FOREIGN.items():
        suffixes = ", ".join(suffix or "folder" for suffix in layout.SUFFIXES)
        switches = ", ".join(sorted(settings_of_target(layout) - {*getattr(layout, "OPTIONS", ())})) or "–"
        lines.append(f"| `{name}` | {layout.MODEL_TYPE} | {suffixes} | {switches} | {layout.ABOUT} |")
    for name, layout in FOREIGN.items():
        lines += ["", f"### `{name}`", "", "| Hugging Face | here | turn |", "|---|---|---|"]
        for line in layout.TABLE:
            absent = f"; absent with `{line.switch}=false`" if line.switch else ""
            head = "; the embeddings where tied" if line.head else ""
            own = ", ".join(f"`{each}`" for each in line.own)
            lines.append(f"| `{line.hf}` | {own} | {line.turn.name}{absent}{head} |")
        if layout.BUFFERS:
            lines += ["", "No weights: " + ", ".join(f"`{pattern}`" for pattern in layout.BUFFERS) + "."]
    return "\n".join(lines) + "\n"


def test_the_tables_are_those_of_the_code():
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(f"{re.escape(BEGIN)}(.*?){re.escape(END)}", text, re.DOTALL)
    if os.environ.get("KIT_WRITE_DOCS") == "1":
        PAGE.write_text(text.replace(found[0], BEGIN + tables() + END), encoding="utf-8")
        return
    assert found[1] == tables(), "make docs"

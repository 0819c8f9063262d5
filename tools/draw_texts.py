"""Draw texts from a seed, to judge the language: sentences of README and docs, docstrings, and error texts.

python tools/draw_texts.py --seed 1 --count 10
"""

from __future__ import annotations

import argparse
import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [
    path
    for top in ("client/src", "server/src", "examples", "benchmarks")
    for path in sorted((ROOT / top).rglob("*.py"))
    if path.parent.name != "v1"
]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def sentences() -> Iterator[str]:
    """Return the sentences of README and docs, without tables, headings and code."""
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```|^    .*?$|^\|.*?$|^#.*?$", "", page.read_text())
        for paragraph in re.split(r"\n\s*\n|\n- |\n\d+\. ", text):
            for sentence in re.split(r"(?<=[.:])\s+(?=[A-Z`\[*])", " ".join(paragraph.split())):
                if len(sentence.split()) >= 5:
                    yield f"{page.name}: {sentence}"


def docstrings() -> Iterator[str]:
    """Return the docstrings of the source."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
                yield f"{path.name}: {getattr(node, 'name', 'module')}: {text}"


def errors() -> Iterator[str]:
    """Return the texts of raised errors, with {...} for their values."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
                continue
            text = node.exc.args[0]
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                yield f"{path.name}: {text.value}"
            elif isinstance(text, ast.JoinedStr):
                parts = (each.value if isinstance(each, ast.Constant) else "{...}" for each in text.values)
                yield f"{path.name}: {''.join(str(part) for part in parts)}"


def main() -> None:
    """Print `count` texts of each kind."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--count", type=int, default=10)
    given = options.parse_args()
    dice = random.Random(given.seed)
    for title, texts in (("Sentences", sentences()), ("Docstrings", docstrings()), ("Errors", errors())):
        print(f"{title}\n")
        for text in dice.sample(list(texts), given.count):
            print(f"- {text}\n")


if __name__ == "__main__":
    main()

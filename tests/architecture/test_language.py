"""Texts are plain technical English, docstrings begin with a verb or a noun, and references resolve."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for top in ("client/src", "server/src", "examples", "benchmarks", "tools", "deploy")
    for path in (ROOT / top).rglob("*.py")
    if path.parent.name != "v1"
)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "*/README.md", "tests/**/README.md")
    for path in ROOT.glob(pattern)
    if not any(part.startswith(".") or part == "build" for part in path.relative_to(ROOT).parts)
)
BAD_STARTS = re.compile(
    r"(What|Whether|Who|Whose|Whom|Whoever|How|Where|When|That|As|Of|By|If|Nothing|Nobody|Somebody)\b(?! \w+ing\b)"
)
BAD_WORDS = re.compile(
    r"\b(anew|whoever|whereof|nobody|somebody|the house|the rooms|of which nothing|be told from|what stands|"
    r"gives? (?:it|them|its places?) back)\b",
    re.I,
)


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Return (place, docstring) of each docstring of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node)):
            yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


def strings(path: Path) -> Iterator[tuple[str, str]]:
    """Return (place, text) of each string of a file that is a sentence: docstrings, errors, log lines, help texts."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.count(" ") >= 2:
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.value


def paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    """Return (place, text) of each line of a page outside its code blocks."""
    fenced = False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield f"{path.relative_to(ROOT)}:{number}", line


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    assert [found for path in SOURCES for found in docstrings(path) if BAD_STARTS.match(found[1])] == []


def test_no_text_uses_a_word_that_reads_as_translated() -> None:
    texts = [each for path in SOURCES for each in strings(path)] + [each for page in PAGES for each in paragraphs(page)]
    assert [(where, text) for where, text in texts if BAD_WORDS.search(" ".join(text.split()))] == []


# References


def headings(path: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", re.sub(r"(?ms)^```.*?^```", "", path.read_text()), re.M)


def anchor(heading: str) -> str:
    """Return the anchor that a page's renderer generates for a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_link_leads_to_a_file_and_a_heading() -> None:
    for page in PAGES:
        for target, fragment in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text()):
            path = page.parent / target if target else page
            assert path.exists(), f"{page.relative_to(ROOT)} links to {target}"
            if fragment:
                assert fragment in {anchor(heading) for heading in headings(path)}, f"{page.name} links to #{fragment}"


def test_every_section_that_a_text_cites_exists() -> None:
    """Citations have the form: docs/design.md, "The partial"."""
    everything = [*SOURCES, *PAGES, *ROOT.glob("proto/**/*.proto"), *ROOT.glob("tests/**/*.py"), ROOT / "Makefile"]
    for path in everything:
        for page, section in re.findall(r'(docs/[\w/-]+\.md),\s+(?:#\s+)?"([^"]+)"', path.read_text()):
            assert section in headings(ROOT / page), f"{path.relative_to(ROOT)} cites {page}, {section!r}"


def test_every_file_that_a_text_names_exists() -> None:
    """Every path or module named in a source, page, contract or manifest exists; modules are found by file name."""
    tops = ("client", "server", "tests", "examples", "benchmarks", "tools", "deploy", "docs")
    names = {path.name for top in tops for path in (ROOT / top).rglob("*")}
    for path in [*SOURCES, *PAGES, *ROOT.glob("proto/**/*.proto"), *ROOT.glob("deploy/**/*.y*ml")]:
        text = path.read_text()
        for name in re.findall(r"\b((?:docs|tests|proto|deploy|benchmarks|examples)/[\w./-]*\w)", text):
            found = (ROOT / name).exists() or list(ROOT.glob(f"{name}*")) or name.endswith((".json", ".png"))
            assert found, f"{path.relative_to(ROOT)} names {name}"
        for name in re.findall(r"`(\w+\.py)`", text):
            assert name in names, f"{path.relative_to(ROOT)} names {name}"


def test_every_adr_that_a_text_cites_exists() -> None:
    numbers = {path.name[:4] for path in (ROOT / "docs/adr").glob("*.md")}
    for path in [*SOURCES, *PAGES]:
        for number in re.findall(r"\bADR (\d+)\b", path.read_text()):
            assert number.zfill(4) in numbers, f"{path.relative_to(ROOT)} cites ADR {number}"


def test_every_name_in_backticks_of_a_docstring_exists() -> None:
    """Each `name` or `module.name` is a definition, an attribute or an argument somewhere in the source."""
    known: set[str] = set()
    for path in [*SOURCES, *(ROOT / "client/src/shardloss/v1").glob("*.pyi")]:
        known |= {path.stem, path.parent.name, *defined(path)}
    known.update(re.findall(r"\w+", "".join(path.read_text() for path in ROOT.glob("proto/**/*.proto"))))
    for path in SOURCES:
        for where, text in docstrings(path):
            for name in re.findall(r"`([A-Za-z_][\w.]*)(?:\(\))?`", text):
                if name.endswith((".py", ".md", ".toml", ".json")):
                    continue
                assert set(name.split(".")) <= known or exists(name), f"{where} names {name}"


def defined(path: Path) -> Iterator[str]:
    """Return the names of a file's code: definitions, arguments, attributes, variables, imports and keys."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.alias):
            yield from node.name.split(".")
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.arg | ast.keyword):
            yield node.arg or ""
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            yield node.value


def exists(name: str) -> bool:
    """Return True if a dotted name can be imported, such as one of torch, grpc or the standard library."""
    module, _, attribute = name.rpartition(".")
    if not module:
        return False
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


@pytest.mark.parametrize("package", ["client", "server"])
def test_each_package_carries_the_licence(package: str) -> None:
    assert (ROOT / package / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()

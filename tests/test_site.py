"""The documentation's site: all pages are in its navigation, and what the reference names is there."""

import ast
import importlib
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
GENERATED = {"index.md", "reference.md"}


def test_every_page_is_in_the_navigation():
    _, nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")
    named = set(re.findall(r"([\w/-]+\.md)$", nav, re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert named == pages | GENERATED


def anchors(page):
    """What headings of a page are called in links."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)
    return {
        re.sub(r"[^\w\- ]", "", line.lower()).strip().replace(" ", "-") for line in re.findall(r"^#+ (.+)$", text, re.M)
    }


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    wrong, seen = [], 0
    for page in pages:
        for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
            name, _, anchor = target.partition("#")
            to = page.parent / name if name else page
            seen += 1
            if not to.exists() or (anchor and anchor not in anchors(to)):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong and seen > 200


def test_what_the_reference_names_can_be_imported():
    tree = ast.parse((ROOT / "docs" / "site_pages.py").read_text(encoding="utf-8"))
    (value,) = (n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "REFERENCE")
    names = [name for part in ast.literal_eval(value).values() for name in part]
    assert len(names) > 20
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None) or importlib.import_module(name)
        assert found.__doc__, f"{name} has no docstring"


def test_what_is_cited_is_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")

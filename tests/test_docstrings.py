"""Every public function, class and method of the package says in a docstring what it is."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def undocumented(source):
    """Public names of a file without a docstring; what is inside functions is nobody's business."""
    found = []

    def look(node, prefix):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            setter = any(isinstance(d, ast.Attribute) and d.attr == "setter" for d in child.decorator_list)
            if child.name.startswith("_") or setter:
                continue
            if ast.get_docstring(child) is None:
                found.append(prefix + child.name)
            if isinstance(child, ast.ClassDef):
                look(child, f"{prefix}{child.name}.")

    look(ast.parse(source), "")
    return found


def test_every_public_name_has_a_docstring():
    folder = ROOT / "llmsched_gym"
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
    found = {name: undocumented(path.read_text(encoding="utf-8")) for name, path in files.items()}
    assert len(found) > 100
    assert {name: names for name, names in found.items() if names} == {}


def test_a_name_without_one_would_be_found():
    source = (
        'class A:\n    """A."""\n    def b(self): ...\n    def _c(self): ...\ndef d():\n    """D."""\ndef e(): ...\n'
    )
    assert undocumented(source) == ["A.b", "e"]

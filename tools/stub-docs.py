"""Copies the docstrings of the built core into its type stub, ``_native.pyi``: ``make stub``.

The doc comments of ``src/py`` are the one source: ``help()`` shows them, and this writes them where editors look. A test
holds that the stub is what this would write.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, Iterator, List, Tuple, Union

Documented = Union[ast.ClassDef, ast.FunctionDef]


def documented(tree: ast.Module, module: ModuleType) -> Iterator[Tuple[Documented, Any]]:
    """The classes, functions, methods and properties of the stub that have a docstring in the module."""
    nodes: List[Tuple[ast.stmt, Any]] = [(node, module) for node in tree.body]
    for node, owner in nodes:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and not node.name.startswith("_"):
            value = vars(owner).get(node.name)
            if inspect.isclass(value):
                nodes.extend((inner, value) for inner in node.body)
            if inspect.getdoc(value):
                yield node, value


def literal(text: str, indent: str) -> List[str]:
    """A docstring as lines of source."""
    text = text.replace("\\", "\\\\").replace('"""', '\\"""')
    first, *rest = text.split("\n")
    if not rest:
        return ['{}"""{}"""'.format(indent, first)]
    return [indent + '"""' + first] + [indent + line if line else "" for line in rest] + [indent + '"""']


def with_docs(stub: str, module: ModuleType) -> str:
    """The stub with the docstrings of the module in place of its own."""
    lines = stub.splitlines()
    found = sorted(documented(ast.parse(stub), module), key=lambda pair: pair[0].lineno, reverse=True)
    for node, value in found:
        body = node.body[0]
        is_doc = isinstance(body, ast.Expr) and isinstance(getattr(body.value, "value", None), str)
        doc = literal(inspect.getdoc(value) or "", " " * (node.col_offset + 4))
        start, end = body.lineno - 1, body.end_lineno or body.lineno
        if is_doc:
            lines[start:end] = doc
        elif isinstance(node, ast.FunctionDef):
            # "def f(self) -> None: ..."
            lines[start:end] = [lines[start][: body.col_offset].rstrip()] + doc
        else:
            lines[start:start] = doc + [""]
    return "\n".join(lines) + "\n"


def main() -> int:
    from thirstys_waterfall.security.microvm_isolation import _native

    path = Path(_native.__file__).with_name("_native.pyi")
    path.write_text(with_docs(path.read_text(), _native))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The source code of Python's standard library: real text that every machine with Python has.

Prose and code that people wrote, under the Python Software Foundation's licence, for runs that are
to behave as on real data without any being fetched: loss curves of templated problems jump where a
model finds the template, those of text fall smoothly.
"""

from __future__ import annotations

import ast
import platform
import random
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from svend.data.documents import Document, Role, conversation

# Tests repeat themselves, and what is installed beside the library differs between machines.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}
LONGEST_CHARACTERS = 4000


def library_name() -> str:
    """Return whose library it is, such as `CPython 3.11.7`."""
    return f"{platform.python_implementation()} {platform.python_version()}"


def library_documents(count: int, seed: int) -> Iterator[Document]:
    """Yield functions and classes of the standard library, in an order drawn from the seed.

    At most `count`, or as many as there are: some 15,000.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = []
    for path in sorted(root.rglob("*.py")):
        if not LEFT_OUT & set(path.relative_to(root).parts):
            texts += list(_pieces(path))
    random.Random(seed).shuffle(texts)
    for text in texts[:count]:
        yield conversation((Role.TEXT, text))


def _pieces(path: Path) -> Iterator[str]:
    """Yield a module's statements, methods of classes one by one; none of what cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        with warnings.catch_warnings(action="ignore", category=SyntaxWarning):
            module = ast.parse(text)
    except (OSError, ValueError, SyntaxError):
        return  # a few modules are there to be refused
    lines = text.splitlines()
    starts = {0}
    for node in module.body:
        inner = node.body if isinstance(node, ast.ClassDef) else []
        starts |= {statement.lineno - 1 for statement in (node, *inner)
                   if isinstance(statement, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)}
    ends = [*sorted(starts)[1:], len(lines)]
    for start, end in zip(sorted(starts), ends, strict=True):
        piece = "\n".join(lines[start:end]).strip("\n")[:LONGEST_CHARACTERS]
        if len(piece) > 80:
            yield piece

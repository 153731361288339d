"""Modules import one another in an order: each can be imported first."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import svend

ROOT = Path(svend.__file__).parents[1]


def needed_by(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield what a module imports as it is imported itself, not what its functions do later."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{module}: imports are absolute"
            # A name may be a module's, too.
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def parents_of(name: str) -> list[str]:
    return [name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)]


def test_no_module_needs_one_that_needs_it() -> None:
    modules = {}
    for path in (ROOT / "svend").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    graph = {}
    for module, path in modules.items():
        wanted = set(needed_by(module, ast.parse(path.read_text(encoding="utf-8"))))
        # To import a.b.c is to import a and a.b; those that hold the module itself are there.
        wanted |= {parent for name in wanted for parent in parents_of(name)}
        graph[module] = {name for name in wanted
                         if name in modules and not f"{module}.".startswith(f"{name}.")}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them
    assert len(graph["svend.pipeline.runner"]) > 10

"""All that is said to CUDA is said in one module."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SVEND = Path(__file__).resolve().parents[1] / "svend"
# The worker of `bench train` imports nothing of Svend but the spec: a peer has its own environment.
EXCEPTIONS = {SVEND / "cuda.py", SVEND / "bench" / "worker.py"}


def names_cuda(source: str) -> bool:
    """Whether code, not its comments and strings, names torch.cuda."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.cuda"):
            return True
        if isinstance(node, ast.Import) and any(a.name.startswith("torch.cuda")
                                                for a in node.names):
            return True
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            names = [alias.name for alias in node.names]
            if module.startswith("torch.cuda") or (module == "torch" and "cuda" in names):
                return True
    return False


def test_no_other_module_names_torch_cuda() -> None:
    modules = set(SVEND.rglob("*.py")) - EXCEPTIONS
    assert len(modules) > 100
    assert [str(path) for path in sorted(modules) if names_cuda(path.read_text())] == []


@pytest.mark.parametrize("source", [
    "import torch\ntorch.cuda.synchronize()", "import torch.cuda.amp", "from torch import cuda",
    "from torch.cuda import synchronize",
])
def test_each_way_of_naming_it_is_seen(source: str) -> None:
    assert names_cuda(source)
    assert not names_cuda('"""torch.cuda"""\nfrom svend import cuda\ncuda.synchronize()')

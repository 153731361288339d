"""What the documents name is there: links, files, folders, tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Which a page has the reader write.
THE_READERS_OWN = {"conf/data/calls.yaml", "conf/data/desk.yaml", "conf/data/seal.yaml"}
# Paths that begin in the top folder; what ends in neither slash nor suffix may be another's.
NAMED = re.compile(
    r"(?<![\w./<-])((?:docs|conf|svend|tests|notebooks|\.ci)/(?:[\w.-]+/)*"
    r"(?:[\w-]+\.(?:md|py|yaml|ipynb|png|jsonl?))?)(?![\w*<-])(?:::(\w+))?"
)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)
             if not target.startswith(("http://", "https://", "#"))]
    missing = [link for link in links if not (page.parent / link).exists()]
    for path, test in NAMED.findall(text):
        if path in THE_READERS_OWN:
            continue
        if not (ROOT / path).exists():
            missing.append(path)
        elif test and f"def {test}(" not in (ROOT / path).read_text(encoding="utf-8"):
            missing.append(f"{path}::{test}")
    assert missing == []

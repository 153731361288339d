"""Write docs/licences.md: what every package that constraints.txt pins says of its licence.

The packages are those of this environment, which must be at the pinned versions: `make licences`.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
RUNTIME, EXTRAS, DEVELOPMENT = "Runtime", "Extras", "Development"
# Of packages whose metadata name none, or only "OSI approved": what their licence files say.
READ_IN_ITS_FILE = {"huey": "MIT", "skops": "MIT", "torchao": "BSD-3-Clause", "zss": "BSD-3-Clause"}
# What a licence asks of those who pass the package on, the strictest first.
KINDS = (
    ("copyleft", r"AGPL|(?<!L)GPL|(?<!Lesser )General Public"),
    ("weak copyleft", r"LGPL|Lesser|MPL|Mozilla|EPL|CDDL"),
    ("proprietary", r"Proprietary"),
    ("permissive", r"MIT|BSD|Apache|ISC|PSF|Python Software Foundation|HPND|Zlib"),
)
UNKNOWN = "unknown"
INTRODUCTION = """# Licences

Made by `make licences`, of what every package says of itself, at the versions of `constraints.txt`.
{own}

A wheel may bundle more than the package is made of; its own licence files say so. Those of numpy,
scipy and scikit-learn hold GCC's run-time libraries (GPL 3 with GCC's run-time exception), that of
pyzmq libzmq (MPL 2.0), that of psycopg-binary PostgreSQL's client and what that needs. On a machine
with CUDA, torch brings NVIDIA's libraries (`nvidia-*`), which are proprietary. They are not pinned
here: torch pins them itself.
"""


@dataclass(frozen=True)
class Package:
    """A pinned package, what it says of its licence, and what it is there for."""

    name: str
    version: str
    licence: str
    group: str

    @property
    def kind(self) -> str:
        """What the licence asks for: one of KINDS, or "unknown"."""
        return next((kind for kind, words in KINDS if re.search(words, self.licence)), UNKNOWN)


def pins(text: str) -> dict[str, str]:
    """Return version by name of a constraints file that holds nothing but `name==version`."""
    return dict(line.split("==") for line in text.splitlines())


def stated_licence(name: str) -> str:
    """Return what an installed package's metadata name as its licence, else "unknown"."""
    metadata = importlib.metadata.metadata(name)
    for field in ("License-Expression", "License"):
        for stated in metadata.get_all(field) or []:
            if "\n" not in stated and len(stated) < 120 and stated not in (
                "UNKNOWN", "Dual License"
            ):
                return str(stated)
    # Where the field holds the licence's whole text, the classifiers name it.
    classifiers = [line.split(" :: ")[-1] for line in metadata.get_all("Classifier") or []
                   if line.startswith("License :: ") and not line.endswith(":: OSI Approved")]
    return ", ".join(classifiers) or READ_IN_ITS_FILE.get(canonicalize_name(name), UNKNOWN)


def needed(roots: Iterable[str]) -> set[str]:
    """Return the packages that the requirements `roots` bring into this environment."""
    found: set[str] = set()
    visited: set[str] = set()
    waiting = list(roots)
    while waiting:
        requirement = Requirement(waiting.pop())
        key = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        found.add(key)
        for extra in ("", *requirement.extras):
            if f"{key}[{extra}]" in visited:
                continue
            visited.add(f"{key}[{extra}]")
            for line in importlib.metadata.requires(requirement.name) or []:
                below = Requirement(line)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    below.marker = None
                    waiting.append(str(below))
    return found


def read_packages(constraints: str) -> list[Package]:
    """Return every pinned package as it is installed here; SystemExit where it is not."""
    extras = importlib.metadata.metadata("svend").get_all("Provides-Extra") or []
    runtime = needed(["svend"])
    optional = needed([f"svend[{','.join(extra for extra in extras if extra != 'dev')}]"])
    found = []
    for name, version in pins(constraints).items():
        try:
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed != version:
            sys.exit(f"error: {name}: {installed} here, {version} in constraints.txt; "
                     "run make .venv/installed")
        key = canonicalize_name(name)
        group = RUNTIME if key in runtime else EXTRAS if key in optional else DEVELOPMENT
        found.append(Package(name, version, stated_licence(name), group))
    return found


def render(packages: Sequence[Package], own: str) -> str:
    """Return the page: what is not permissive first, then every package by what it is there for."""
    parts = [INTRODUCTION.format(own=own)]
    called_out = [package for package in packages if package.kind != "permissive"]
    order = [*(kind for kind, _ in KINDS), UNKNOWN]
    called_out.sort(key=lambda package: (order.index(package.kind), package.name.lower()))
    parts.append("## Copyleft, proprietary or unknown\n")
    parts.append(_table(("package", "version", "licence", "which is", "there for"), (
        (p.name, p.version, p.licence, p.kind, p.group.lower()) for p in called_out
    )) if called_out else "None.\n")
    told = {RUNTIME: "what `pip install svend` brings",
            EXTRAS: "only with the extras bench, float8, lowbit, postgres, server and wandb",
            DEVELOPMENT: "only with the extra dev"}
    for group, what in told.items():
        of_group = [package for package in packages if package.group == group]
        parts.append(f"## {group}: {what}\n\n{len(of_group)} packages.\n")
        parts.append(_table(("package", "version", "licence"),
                            ((p.name, p.version, p.licence) for p in of_group)))
    return "\n".join(parts)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def own_licence() -> str:
    """Return the sentence on Svend's own licence."""
    if any(ROOT.glob("LICENSE*")):
        return "Svend's own stands in LICENSE."
    return "Svend itself names none: there is no licence file."


if __name__ == "__main__":
    packages = read_packages((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    Path(sys.argv[1]).write_text(render(packages, own_licence()), encoding="utf-8")

"""Which code each stage's results depend on, as a hash; `stage_lock.json` says at which version it had which hash.

The code of a stage is its module in `ray_jobs` and everything of `components` that it imports, directly or not. Comments,
docstrings and formatting do not count. `python -m tests.stage_lock` writes the lock after versions were raised.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from pathlib import Path

from ray_jobs.stage import VERSIONS

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tests" / "stage_lock.json"
NOT_RESULTS = {"components.errors", "components.storage", "components.leases", "components.records"}
"""Modules that carry results and do not make them."""


def code_of(stage: str) -> str:
    """Hash of the code that makes a stage's result."""
    modules = sorted(_closure(f"ray_jobs.{stage}"))
    text = "\n".join(f"{name}\n{_normalised(_path(name))}" for name in modules)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def current() -> dict[str, dict[str, object]]:
    return {stage: {"version": version, "code": code_of(stage)} for stage, version in VERSIONS.items()}


def _closure(start: str) -> set[str]:
    seen: set[str] = set()
    todo = [start]
    while todo:
        name = todo.pop()
        if name in seen or name in NOT_RESULTS or name == "ray_jobs.stage":
            continue
        seen.add(name)
        todo += _imports(_path(name))
    return seen


def _imports(path: Path) -> list[str]:
    found: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("components", "ray_jobs"):
            # `from package import module` names modules too.
            candidates = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [c for c in candidates if _path(c).is_file()]
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in ("components", "ray_jobs")]
    return found


def _path(module: str) -> Path:
    path = ROOT / Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _normalised(path: Path) -> str:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            # Docstrings, of attributes too: expressions that are a bare string.
            kept = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))]
            node.body = kept or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree)


if __name__ == "__main__":
    LOCK.write_text(json.dumps(current(), indent=1) + "\n")
    sys.stdout.write(f"wrote {LOCK.relative_to(ROOT)}\n")

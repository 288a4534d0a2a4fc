"""The overlays as kustomize renders them, once per test process, and ways to plant a mistake into them."""

from __future__ import annotations

import copy
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from k8s.check import Finding, check, render

ROOT = Path(__file__).parents[2]
OVERLAYS = ("local", "gpu", "gpu-rdma")
CRDS = ROOT.parent / "shared" / "crds"

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl renders the overlays and is not here"
)
needs_crds = pytest.mark.skipif(
    not CRDS.is_dir(), reason=f"no CRDs in {CRDS}: kinds of Ray and Kueue have no schema here"
)


@cache
def _rendered(overlay: str) -> tuple[dict[str, Any], ...]:
    folder = ROOT / "k8s" / "overlays" / overlay
    parts = [folder / part for part in ("testbed", "run") if (folder / part).is_dir()]
    return (*render(folder), *(document for part in parts for document in render(part)))


def documents(overlay: str) -> list[dict[str, Any]]:
    """What stands, one run of it, and the local one's testbed; yours to change."""
    return copy.deepcopy(list(_rendered(overlay)))


def findings(of: list[dict[str, Any]]) -> list[Finding]:
    """All findings, with the CRDs' schemas where they are at hand."""
    return check(of, CRDS if CRDS.is_dir() else None)


def one(among: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    """The document of that kind and name."""
    return next(d for d in among if d["kind"] == kind and d["metadata"]["name"] == name)

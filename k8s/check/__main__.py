"""`python -m k8s.check OVERLAY…`: everything that is wrong with what would be applied together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k8s.check.documents import render
from k8s.check.rules import check, notes
from k8s.check.schemas import VERSIONS


def main(words: Sequence[str] | None = None) -> int:
    """0 when nothing is wrong, 1 with findings, 2 where something could not be rendered."""
    parser = argparse.ArgumentParser(prog="python -m k8s.check", description=__doc__)
    parser.add_argument("overlay", nargs="+", type=Path, help="kustomizations that are applied together")
    parser.add_argument("--crds", type=Path, help="folder with the CRDs of KubeRay and Kueue (*.yaml)")
    parser.add_argument(
        "--kubernetes", nargs="+", default=VERSIONS, metavar="VERSION", help="versions of your clusters"
    )
    given = parser.parse_args(words)
    try:
        documents = [document for overlay in given.overlay for document in render(overlay)]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    findings = check(documents, given.crds, tuple(given.kubernetes))
    for finding in findings:
        print(finding)
    print(f"{len(documents)} documents, {len(findings)} findings")
    if given.crds is None:
        print("Without --crds, kinds of Ray and Kueue were held to the rules alone and to no schema.")
    for note in notes(documents):
        print(f"Before you apply: {note}")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

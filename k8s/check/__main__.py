"""`python -m k8s.check OVERLAY…`: everything that is wrong with what would be applied together."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from k8s.check.documents import render
from k8s.check.rules import check, notes
from k8s.check.schemas import VERSIONS, known_versions


def main(words: Sequence[str] | None = None) -> int:
    """0 when nothing is wrong, 1 with findings, 2 where something could not be rendered or held to a version."""
    parser = argparse.ArgumentParser(prog="python -m k8s.check", description=__doc__)
    parser.add_argument("overlay", nargs="+", type=Path, help="kustomizations that are applied together")
    parser.add_argument("--crds", type=Path, help="folder with the CRDs of KubeRay and Kueue (*.yaml)")
    parser.add_argument(
        "--kubernetes", nargs="+", default=VERSIONS, metavar="VERSION", help="versions of your clusters"
    )
    given = parser.parse_args(words)
    unknown = [version for version in given.kubernetes if version not in known_versions()]
    if unknown:
        print(
            f"no schemas of Kubernetes {', '.join(unknown)}; there are: {', '.join(known_versions())}", file=sys.stderr
        )
        return 2
    try:
        documents = [document for overlay in given.overlay for document in render(overlay)]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    findings = check(documents, given.crds, tuple(given.kubernetes))
    for finding in findings:
        print(finding)
    told = list(notes(documents))
    if given.crds is None:
        told.append("kinds of Ray and Kueue were held to the rules alone and to no schema: give --crds")
    for note in told:
        print(f"note: {note}")
    print(
        f"{len(documents)} documents: {len(findings)} findings; {len(told)} notes: what only you can know, and no finding"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())

"""Print what a pyproject.toml depends on, a line each: the image installs that in a layer that the code does not change."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path


def main(path: str) -> None:
    """Print the dependencies of the project in `path`, without its extras."""
    print(*tomllib.loads(Path(path).read_text())["project"]["dependencies"], sep="\n")


if __name__ == "__main__":
    main(sys.argv[1])

"""Whether a container of the image does well: where Ray runs in it, Ray's agent must say so; else its program is its health.

Exit status 0 or 1, as HEALTHCHECK has it. Nothing but the standard library, for it is run often.
"""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

AGENT = "http://127.0.0.1:52365/api/healthz"
"""Ray's node agent, which asks the raylet, and on a head the GCS; open without a token, as KubeRay's probes need it."""


def main(processes: Path = Path("/proc"), agent: str = AGENT) -> int:
    """0 if all is well, 1 with a line on stderr if not."""
    if not any(_name(one) == "raylet" for one in processes.glob("[0-9]*")):
        return 0
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(agent, timeout=8):
            return 0
    except OSError as error:  # HTTPError is one: the agent says that something is wrong
        print(f"a raylet runs here, and {agent} says: {error}", file=sys.stderr)
        return 1


def _name(process: Path) -> str:
    try:
        return (process / "comm").read_text().strip()
    except OSError:
        return ""  # it has ended meanwhile


if __name__ == "__main__":
    sys.exit(main())

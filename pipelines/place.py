"""Where a run is tracked, settled before its work begins."""

from __future__ import annotations

import sys
from pathlib import Path

from components.tracking import address_of, told_by_environment
from components.tracking.address import VARIABLE, shown


def settled(named: str | None, workspace: Path) -> str:
    """As `address_of`; says so on stderr where nothing but the environment decides it. Raises TrackingError for what is no
    address: at the end of a run it would be too late."""
    address = address_of(named, workspace)
    if not named and told_by_environment():
        sys.stderr.write(f"realign: MLflow is at {shown(address)} ({VARIABLE})\n")
    return address

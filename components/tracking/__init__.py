"""MLflow: runs as a projection of what stages left behind, and the registry of realigned models. Only here mlflow is imported.

`address` is where, `server` the connection, `runs` the projection, `registry` the versions, `promotions` who is in service.
"""

from components.tracking.address import address_of, default_uri, told_by_environment
from components.tracking.names import CANDIDATE, CHAMPION, EVALUATION_TAG, GATE_TAG, PREVIOUS
from components.tracking.registry import Registered, Registry, Version
from components.tracking.runs import Tracker
from components.tracking.server import TrackingUnavailableError

__all__ = [
    "CANDIDATE",
    "CHAMPION",
    "EVALUATION_TAG",
    "GATE_TAG",
    "PREVIOUS",
    "Registered",
    "Registry",
    "Tracker",
    "TrackingUnavailableError",
    "Version",
    "address_of",
    "default_uri",
    "told_by_environment",
]

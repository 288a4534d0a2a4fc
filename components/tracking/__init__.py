"""MLflow: runs as a projection of what stages left behind, and the registry of realigned models. Only here mlflow is imported.

`server` is the connection, `runs` the projection, `registry` the versions, `promotions` who is in service.
"""

from components.tracking.names import CANDIDATE, CHAMPION, EVALUATION_TAG, GATE_TAG, PREVIOUS
from components.tracking.registry import Registered, Registry, Version
from components.tracking.runs import Tracker
from components.tracking.server import TrackingUnavailableError, default_uri

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
    "default_uri",
]

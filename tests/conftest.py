"""No test, and nothing that one starts, talks to the MLflow that the environment around it names."""

from __future__ import annotations

import os

for _name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[_name]

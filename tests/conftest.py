"""What all tests and everything that they start have around them."""

from __future__ import annotations

import os
import signal

# No test talks to the MLflow that the environment around it names.
for _name in [name for name in os.environ if name.startswith("MLFLOW_")]:
    del os.environ[_name]

# A shell starts what it puts into the background with SIGINT ignored, and children inherit that: none would hear Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

"""Tags and aliases under which MLflow shows what this project leaves there."""

from __future__ import annotations

FINGERPRINT_TAG = "realign.fingerprint"
PROJECTED_TAG = "realign.projected"
"""Hash of what was projected: set last, so a run that has it is complete."""
ATTACHED_TAG = "realign.attached"
"""Identity of what a run's report says: set last, so a run that has it has the files."""
DIFFERING_TAG = "realign.params_differ"
WEIGHTS_TAG = "weights_uri"
SHA256_TAG = "sha256"
RECORD_TAG = "realign.record"
"""Of a registered version: the result (`<stage>/<fingerprint>`) whose `model/` are its weights."""
FORM_TAG = "realign.form"
CONFIG_TAG = "realign.config"
"""Name of the run config."""
EVALUATION_TAG = "realign.evaluation"
"""Of a registered version: the evaluation that its metrics come from. With `.aligned` and `.finetune`: those of the models that
its gate compares it with. Each with `.sha256`: a hash over what was asked and answered there."""
OLDER_METRICS_TAG = "realign.metrics_not_measured_again"
"""Of a registered version: metrics that an earlier evaluation measured and its last one did not; MLflow deletes none."""
GATE_TAG = "realign.gate"
"""Of a finetune's run and of a registered version: `passed` or `shut`, as it was decided last; `none` where it had no gate."""
REQUIREMENTS_TAG = "realign.gate.requirements"
FINDINGS_TAG = "realign.gate.findings"
"""What the gate demands, and what became of that when it was decided last: JSON."""
LEDGER_TAG = "realign.promotions_of"
"""Of a registered model that is the ledger of another one's promotions: that one's name."""

CANDIDATE, CHAMPION, PREVIOUS = "candidate", "champion", "previous"
"""Aliases of a registered model: the version that was registered last, the one in service, and the one before it."""
TAG_CHARS = 60_000
"""Of one tag of a version: MLflow allows 100,000, and MySQL's TEXT holds 65,535 bytes."""

"""A repository of the Hugging Face hub, fetched into the hub's own cache: a directory like any other."""

from __future__ import annotations

from pathlib import Path

from components.checkpoints.adapter_parsing import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from components.checkpoints.places import HubId, Located
from components.checkpoints.quantised import SIDE_FILES as QUANTISED_FILES
from components.checkpoints.safetensors import INDEX_NAME, SINGLE_NAME, read_json
from components.checkpoints.writer import TEMPLATE_DIRECTORY, TOKENIZER_FILES
from components.errors import CheckpointError

SMALL = frozenset(
    {"config.json", "generation_config.json", ADAPTER_CONFIG, INDEX_NAME, *TOKENIZER_FILES, *QUANTISED_FILES}
)
"""Files beside the weights that something here looks for, but for chat templates in a folder of their own."""


def hub_snapshot(model: HubId) -> Located:
    """The directory of a repository's snapshot, which holds weights, config and tokenizer; what is in the cache is not fetched
    again. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they mean everywhere.

    A branch or tag is resolved to its commit, which is noted. Raises CheckpointError when there is no such repository or
    revision, access is not granted, or the hub cannot be reached and the cache does not hold it.
    """
    small = [*sorted(SMALL), f"{TEMPLATE_DIRECTORY}/*.jinja"]
    path = _fetch(model, model.revision, small)
    commit = path.name
    # Only what the index names: repositories carry the same weights a second time in other formats.
    weights = [SINGLE_NAME, ADAPTER_WEIGHTS]
    if (path / INDEX_NAME).is_file():
        weight_map = read_json(path / INDEX_NAME).get("weight_map")
        weights += sorted({only(f) for f in weight_map.values()}) if isinstance(weight_map, dict) else []
    _fetch(model, commit, [*small, *weights])
    note = f"{model.repo} of the hub at commit {commit}"
    if model.revision != commit:
        note += f", which {model.revision or 'main'} was when it was opened; write @{commit} to stay with it"
    return Located(path, f"hf://{model.repo}@{commit}", notes=(note,))


def only(name: str) -> str:
    """A pattern that only this name matches."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _fetch(model: HubId, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf://{model.repo}" + (f"@{revision}" if revision else "")
    try:
        return Path(snapshot_download(model.repo, revision=revision, allow_patterns=patterns))
    except GatedRepoError as error:
        raise CheckpointError(
            f"{where}: access is granted on request; ask for it at huggingface.co/{model.repo} and set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{where}: the repository has no such revision; give a commit, tag or branch of it"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where}: no such model on the hub, or a private one; look at the name, or set HF_TOKEN"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{where}: the hub cannot be reached (or HF_HUB_OFFLINE is set) and its cache here does not hold all of the model; "
            "fetch it where there is a network, or give a directory"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{where}: is no model of the hub; write hf://owner/name@revision") from error
    except OSError as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where}: cannot be fetched from the hub ({first}); run again") from error

"""What is fused with what, and how: everything that decides the bytes of a fusion. Light: no torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from components.errors import ConfigError
from components.fusion.merge_settings import MergeMethod, MergeSettings
from components.fusion.settings import NEEDS_UNALIGNED, FusionSettings, MethodName

MERGE_METHODS: tuple[str, ...] = get_args(MergeMethod)
ONE_FINETUNE_METHODS: tuple[str, ...] = tuple(m for m in get_args(MethodName) if m != "random_mask")
"""`random_mask` is a control of experiments, no way to make a model."""


_OPTIONS = {"output_dtype": "dtype", "max_shard_bytes": "max_shard"}
"""Fields whose options have other names."""
_TAKES_SAFE = ("safe_merge",)


class Recipe(BaseModel):
    """Models and methods. References are local directories, URLs or hub ids."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aligned: str
    finetunes: dict[str, str] = Field(min_length=1)
    """name -> reference."""
    unaligned: str | None = None
    """The model that the aligned one was made from."""
    safe: str | None = None
    """safe_merge: a finetune that was made safe."""
    mask: Path | None = None
    """A trained mask's directory."""
    merge: MergeSettings | None = None
    """How several finetunes become one. None: there is one."""
    fusion: FusionSettings
    """What is done with the finetune, or the merged ones."""
    vocabulary: Literal["error", "pad", "truncate"] = "error"
    """Where numbers of tokens differ."""
    one_sided: Literal["error", "keep", "drop"] = "error"
    """Where not all models have a tensor: keep every one, or leave out what the aligned model lacks."""

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.merge is None and len(self.finetunes) > 1:
            raise ValueError(
                f"{self.fusion.method} is for one finetune, there are {len(self.finetunes)}; "
                f"a merge takes several: {', '.join(MERGE_METHODS)}"
            )
        unknown = sorted(set(self.merge.weights) - set(self.finetunes)) if self.merge else []
        if unknown:
            raise ValueError(f"weights of {', '.join(unknown)}, the finetunes are {', '.join(self.finetunes)}")
        names = {"aligned", "unaligned", "safe", "mask"} & set(self.finetunes)
        if names:
            raise ValueError(f"a finetune cannot be called {' or '.join(sorted(names))}; give it another name")
        method = self.fusion.method
        for role, there, methods in (("unaligned", self.unaligned, NEEDS_UNALIGNED), ("safe", self.safe, _TAKES_SAFE)):
            if there is not None and method not in methods:
                raise ValueError(f"{self.method} has no use for --{role}, only {', '.join(methods)}")
        if method in NEEDS_UNALIGNED and self.unaligned is None:
            raise ValueError(f"{method} needs --unaligned, the model that the aligned one was made from")
        if self.mask is not None and self.fusion.method != "masked":
            raise ValueError(f"{self.fusion.method} has no use for a mask")
        if self.mask is None and self.fusion.method == "masked":
            raise ValueError("masked needs a mask")
        return self

    @property
    def method(self) -> str:
        """What people call it."""
        masked = self.fusion.method == "masked"
        if self.merge is None:
            return self.fusion.method
        return f"{self.merge.method}, masked" if masked else self.merge.method


def settings_of(
    method: str, numbers: Mapping[str, Any], output: Mapping[str, Any]
) -> tuple[MergeSettings | None, FusionSettings]:
    """The settings behind a method's name, from the numbers that were given (None: not given).

    A merge under a mask is the mask on the merged task vector. `output` is output_dtype, max_shard_bytes, …. Raises
    ConfigError for an unknown name, a number that the method has no use for, and one that it lacks.
    """
    given = {key: value for key, value in numbers.items() if value not in (None, {})}
    output = {key: value for key, value in output.items() if value is not None}
    try:
        if method in MERGE_METHODS:
            mask = {key: given.pop(key) for key in ("form", "rescale") if key in given}
            merge = MergeSettings(method=method, **given)
            if mask:
                return merge, FusionSettings(method="masked", **mask, **output)
            return merge, FusionSettings(method="interpolation", alpha=1.0, **output)
        if method in ONE_FINETUNE_METHODS:
            return None, FusionSettings(method=method, **given, **output)
    except ValidationError as error:
        text = told(error)
        named = f"method {method} {text.removeprefix('it ')}" if text.startswith("it ") else f"method {method}: {text}"
        raise ConfigError(text if text.startswith(f"method {method}") else named) from error
    raise ConfigError(f"method {method!r} is unknown; there are {', '.join((*MERGE_METHODS, *ONE_FINETUNE_METHODS))}")


def told(error: ValidationError) -> str:
    """pydantic's findings in one line."""
    found: list[str] = []
    useless = [str(one["loc"][0]) for one in error.errors() if one["type"] == "extra_forbidden"]
    if useless:
        found.append(f"it has no use for {', '.join(useless)}")
    for one in error.errors():
        # Of the ways in which a value may be given, the last part of the place says which: nobody asked.
        where = ".".join(_OPTIONS.get(str(part), str(part)) for part in one["loc"] if str(part) not in ("float", "int"))
        if one["type"] == "extra_forbidden" or "function-before" in where:
            continue
        found.append(f"{where}: {one['msg']}" if where else one["msg"].removeprefix("Value error, "))
    return "; ".join(found)

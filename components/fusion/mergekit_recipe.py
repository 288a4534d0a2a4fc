"""What a mergekit YAML asks for, in this package's terms: the models, and the settings once the tensors are known.

Weights with mergekit's `normalize` are divided by their sum here, tensor by tensor, so that the merge itself need not know of
it. Light on purpose: no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from components.errors import ConfigError
from components.fusion.mergekit_parameters import Setting, layer_of, patterned, positions, resolve

Vocabulary = Literal["error", "pad", "truncate"]


@dataclass(frozen=True)
class Rules:
    """One of mergekit's methods: its name here, its parameters, and what it does where the YAML is silent."""

    method: str
    shared: frozenset[str]
    """Parameters that the whole merge has one of."""
    own: frozenset[str]
    """Parameters that each model has one of."""
    idle: frozenset[str] = frozenset()
    """Parameters that mergekit takes and that change nothing there (or no value here)."""
    normalize: bool = False
    rescale: bool = False


_SPARSE = frozenset({"normalize", "rescale", "lambda"})
RULES: Mapping[str, Rules] = {
    "linear": Rules("task_arithmetic", frozenset({"normalize"}), frozenset({"weight"}), normalize=True),
    "task_arithmetic": Rules(
        "task_arithmetic",
        frozenset({"normalize", "lambda"}),
        frozenset({"weight"}),
        frozenset({"density", "rescale", "int8_mask"}),
    ),
    "ties": Rules("ties", _SPARSE, frozenset({"weight", "density"}), frozenset({"int8_mask"}), normalize=True),
    "dare_linear": Rules("dare", _SPARSE, frozenset({"weight", "density"}), frozenset({"int8_mask"}), rescale=True),
    "dare_ties": Rules("dare_ties", _SPARSE, frozenset({"weight", "density"}), frozenset({"int8_mask"}), rescale=True),
    "slerp": Rules("slerp", frozenset({"t"}), frozenset()),
}
"""The methods both have, by mergekit's name."""


@dataclass(frozen=True)
class ModelReference:
    """A model as mergekit writes it: `directory`, `owner/name`, `owner/name@revision`, each perhaps with `+adapter`."""

    model: str
    adapter: str | None = None
    """A LoRA adapter over `model`; what is meant is then the adapted model."""

    def __str__(self) -> str:
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"


@dataclass(frozen=True)
class OnLine:
    """A parsed parameter and the line that it stands on."""

    setting: Setting
    line: int


Scopes = Sequence[Mapping[str, OnLine]]
"""`parameters` sections, the one that goes first in front."""


@dataclass(frozen=True)
class MergekitMerge:
    """A merge read from a mergekit YAML."""

    path: Path
    merge_method: str
    """mergekit's name; `settings` has ours."""
    aligned: ModelReference
    """What task vectors are taken against: `base_model`; for `linear` without one its first model."""
    finetunes: Mapping[str, ModelReference]
    """name -> model, in the file's order; the names are the references' last parts. For `slerp` the model at t = 1."""
    output_dtype: Literal["float32", "bfloat16", "float16"] | None
    """None where the file is silent: mergekit then writes the dtype that its inputs have in common."""
    vocabulary: Vocabulary
    """What to do about vocabularies of other sizes."""
    notes: tuple[str, ...]
    """What is read otherwise than it is written, and keys that change nothing."""
    layers: tuple[int, int] | None = None
    """Layers that the file says the models have, and the line that says so."""
    flags: Mapping[str, bool] = field(default_factory=dict)
    """normalize, rescale."""
    scopes: Scopes = ()
    """Sections that all models share."""
    own_scopes: Mapping[str, Scopes] = field(default_factory=dict)
    """finetune -> its own section, then the shared ones; the aligned model's under the empty name."""

    def settings(self, names: Sequence[str]) -> dict[str, Any]:
        """Arguments for MergeSettings, with numbers by pattern where they are not the same for every tensor.

        `names` are the merged model's tensors: gradients need to know the layers, conditions the names. Densities of
        1 are said, too: left out they would be this package's own. Raises ConfigError listing all that cannot be carried over.
        """
        return _Settings(self, names).build()


class _Settings:
    """One translation; problems are gathered and raised together."""

    def __init__(self, recipe: MergekitMerge, names: Sequence[str]) -> None:
        self.recipe, self.names, self.at = recipe, names, positions(names)
        self.rules = RULES[recipe.merge_method]
        self.problems: list[str] = []

    def build(self) -> dict[str, Any]:
        found: dict[str, Any] = {"method": self.rules.method}
        self._check_layers()
        if "t" in self.rules.shared:
            found |= self._place()
        else:
            weights, densities = self._weights(), self._densities()
            if self.rules.method in ("ties", "dare_ties"):
                found["aggregate"] = "mean" if self.recipe.flags["normalize"] else "sum"
                self._check_signs(weights)
            else:
                self._divide(weights)
            if self.rules.rescale and not self.recipe.flags["rescale"]:
                weights = {
                    one: {n: w * densities[one].get(n, 1.0) for n, w in of.items()} for one, of in weights.items()
                }
            found |= self._factor() | self._density(densities)
            found["weights"] = {one: patterned(of) for one, of in weights.items() if one and of}
        if self.problems:
            raise ConfigError("\n".join(f"{self.recipe.path}:{problem}" for problem in self.problems))
        return found

    def _check_layers(self) -> None:
        if self.recipe.layers is None:
            return
        given, line = self.recipe.layers
        there = 1 + max((i for name in self.names if (i := layer_of(name)) is not None), default=-1)
        if given != there:
            self.problems.append(
                f"{line}: layer_range: [0, {given}] of {there} layers; only whole models are merged here: give [0, {there}]"
            )

    def _values(self, key: str, scopes: Scopes, *, default: float | None = None) -> dict[str, float]:
        """tensor -> value; a tensor that nobody speaks of is left out, or has the default."""
        found = resolve([scope[key].setting for scope in scopes if key in scope], self.at)
        return found if default is None else {name: found.get(name, default) for name in self.names}

    def _line(self, key: str, scopes: Scopes) -> int:
        return next((scope[key].line for scope in scopes if key in scope), 1)

    def _models(self) -> list[str]:
        linear = self.recipe.merge_method == "linear"
        return [one for one in self.recipe.own_scopes if one or linear]

    def _weights(self) -> dict[str, dict[str, float]]:
        found = {}
        for one in self._models():
            scopes = self.recipe.own_scopes[one]
            found[one] = self._values("weight", scopes)
            missing = [name for name in self.names if name not in found[one]]
            if missing:
                who = one or str(self.recipe.aligned)
                self.problems.append(
                    f"{self._line('weight', scopes)}: {who} has no weight for {len(missing)} of {len(self.names)} tensors "
                    f"(first {missing[0]}); give it one, or one for all under parameters"
                )
        return found if not self.problems else {one: dict.fromkeys(self.names, 1.0) for one in found}

    def _divide(self, weights: dict[str, dict[str, float]]) -> None:
        """mergekit's `normalize`, in place; and what `linear` needs so that it is aligned + Σ w (f − aligned)."""
        linear, normalize = self.recipe.merge_method == "linear", self.recipe.flags["normalize"]
        line = self._line("normalize" if normalize else "weight", self.recipe.scopes)
        for name in self.names:
            total = sum(of[name] for of in weights.values())
            if linear and abs(total) < 1e-8:
                self.problems.append(f"{line}: the weights of {name} sum to zero, which cannot be normalized")
                return
            if linear and not normalize and abs(total - 1) > 1e-6:
                self.problems.append(
                    f"{line}: normalize: false with weights that sum to {total:g} ({name}) scales the whole model; "
                    "make them sum to 1"
                )
                return
            if normalize and abs(total) >= 1e-8:  # mergekit leaves a sum of zero alone
                for of in weights.values():
                    of[name] /= total

    def _check_signs(self, weights: Mapping[str, Mapping[str, float]]) -> None:
        if not self.recipe.flags["normalize"]:
            return
        for one, of in weights.items():
            if any(weight < 0 for weight in of.values()):
                line = self._line("weight", self.recipe.own_scopes[one])
                self.problems.append(
                    f"{line}: {one} has a negative weight under normalize: mergekit divides by the sum of signed weights, here "
                    "it is that of their sizes; set normalize: false or take the weight's sign away"
                )

    def _densities(self) -> dict[str, dict[str, float]]:
        """finetune -> tensor -> share kept; 1 where the file is silent, as in mergekit."""
        if "density" not in self.rules.own:
            return {}
        found = {}
        for one in self._models():
            scopes = self.recipe.own_scopes[one]
            found[one] = {name: min(d, 1.0) for name, d in self._values("density", scopes, default=1.0).items()}
            if any(density <= 0 for density in found[one].values()):
                line = self._line("density", scopes)
                self.problems.append(f"{line}: {one} has a density of 0 or less; give it a weight of 0 instead")
        return found

    def _density(self, densities: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        if not densities:
            return {}
        each = {one: patterned(of) for one, of in densities.items() if of}
        numbers = {of if isinstance(of, float) else None for of in each.values()}
        one_for_all = len(numbers) == 1 and None not in numbers
        return {"density": numbers.pop()} if one_for_all else {"densities": each}

    def _factor(self) -> dict[str, Any]:
        """λ, as `scale` where it is one number, else by pattern."""
        if "lambda" not in self.rules.shared:
            return {}
        values = self._values("lambda", self.recipe.scopes, default=1.0)
        factor = patterned(values) if values else 1.0
        if not isinstance(factor, float):
            return {"layers": factor}
        if factor <= 0:
            line = self._line("lambda", self.recipe.scopes)
            self.problems.append(
                f"{line}: lambda is {factor:g}; the factor is above 0 here: turn the weights' signs instead"
            )
        return {"scale": factor}

    def _place(self) -> dict[str, Any]:
        values = self._values("t", self.recipe.scopes)
        line = self._line("t", self.recipe.scopes)
        missing = [name for name in self.names if name not in values]
        if missing:
            self.problems.append(
                f"{line}: t says nothing of {len(missing)} of {len(self.names)} tensors (first {missing[0]}); end its list "
                "with a value that has no filter"
            )
            return {}
        if any(not 0 <= t <= 1 for t in values.values()):
            self.problems.append(f"{line}: t is outside 0 … 1, beyond the two models")
        return {"t": patterned(values)}

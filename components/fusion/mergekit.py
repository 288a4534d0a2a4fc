"""Read a mergekit YAML for a merge that this package has too.

Format: https://github.com/arcee-ai/mergekit, version 0.1.5; methods linear, task_arithmetic, ties, dare_linear, dare_ties and
slerp over whole models (`models`, or one slice that is all layers). What mergekit does and this package does not is refused,
key by key, never passed over. Light on purpose: no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from components.errors import ConfigError
from components.fusion.mergekit_parameters import parse_setting
from components.fusion.mergekit_recipe import RULES, MergekitMerge, ModelReference, OnLine, Rules, Vocabulary
from components.yaml_lines import LocatedYaml, Location

_TOP = (
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
)  # fmt: skip
_ELSEWHERE = {
    "modules": "models of several modules are merged by mergekit only; name whole models under models",
    "chat_template": "the chat template that belongs to the tokenizer is kept; remove the key and edit the output's instead",
}
_DTYPES = ("float32", "bfloat16", "float16")
_FLAGS = ("normalize", "rescale")
_TAKEN = ("aligned", "unaligned", "safe", "mask")
"""Roles of a fusion, which no finetune may be called by."""


def read_recipe(path: Path) -> MergekitMerge:
    """Read and check a mergekit YAML. Raises one ConfigError that lists everything that cannot be carried over, each with its
    line and key. References are as written: relative directories are the caller's to resolve."""
    return _Reader(path).read()


class _Reader:
    """One reading; problems and notes are gathered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.document = LocatedYaml(path, meant="a mergekit config is a mapping (merge_method, models, parameters, …)")
        self.data: dict[str, Any] = self.document.data
        self.problems: list[tuple[int, str]] = []
        self.notes: list[str] = []
        self.flags: dict[str, bool] = {}

    def read(self) -> MergekitMerge:
        self._check_keys(self.data, (), _TOP)
        rules = self._rules()
        base_where, base = self._base()
        entries, inner, layers = self._entries()
        shared = [self._section(self.data.get("parameters"), ("parameters",), rules)]
        if inner is not None:
            shared.insert(0, self._section(self.data["slices"][0].get("parameters"), inner, rules))
        models = [(self._reference(entry.get("model"), (*where, "model")), entry, where) for entry, where in entries]
        known = [(one, entry, where) for one, entry, where in models if one is not None]
        self._check_models([(one, where) for one, _, where in known], base, base_where)
        if base is None and self.data.get("merge_method") == "linear" and known:
            base = known[0][0]
            self.notes.append(f"linear has no base: the differences are taken from {base}, its first model")
        own: dict[str, list[dict[str, OnLine]]] = {"": shared}
        finetunes: dict[str, ModelReference] = {}
        for one, entry, where in known:
            name = "" if one == base else _name(one, finetunes)
            section = self._section(entry.get("parameters"), (*where, "parameters"), rules, own=True)
            if name:
                finetunes[name] = one
            elif section and self.data.get("merge_method") != "linear":
                self.notes.append(f"parameters of the base model {one} change nothing in mergekit; left out")
            own[name] = [section, *shared]
        self._check_count(finetunes, base)
        dtype, vocabulary = self._dtype(), self._vocabulary(base)
        flags = {flag: self.flags.get(flag, rules is not None and getattr(rules, flag)) for flag in _FLAGS}
        self._check_rescale(rules, flags["rescale"])
        if self.problems or rules is None or base is None:
            raise ConfigError("\n".join(f"{self.path}:{line}: {text}" for line, text in sorted(set(self.problems))))
        return MergekitMerge(
            self.path, self.data["merge_method"], base, finetunes, dtype, vocabulary, tuple(dict.fromkeys(self.notes)),
            layers, flags, shared, own,
        )  # fmt: skip

    def _problem(self, where: Location, text: str) -> None:
        self.problems.append((self.document.line(where), f"{'.'.join(map(str, where))}: {text}" if where else text))

    def _check_keys(self, section: Mapping[str, Any], where: Location, known: Iterable[str]) -> None:
        for key in section:
            if key not in known:
                close = difflib.get_close_matches(str(key), list(known), n=1)
                hint = f"did you mean {close[0]!r}?" if close else "mergekit has no such key here"
                self._problem((*where, key), _ELSEWHERE.get(key, hint) if not where else hint)

    def _rules(self) -> Rules | None:
        method = self.data.get("merge_method")
        if method not in RULES:
            given = "missing" if method is None else f"{method} is mergekit's only"
            self._problem(("merge_method",), f"{given}; both have {', '.join(RULES)}")
            return None
        return RULES[str(method)]

    def _base(self) -> tuple[Location, ModelReference | None]:
        inside = self.data.get("slices")
        where: Location = ("base_model",)
        value = self.data.get("base_model")
        if isinstance(inside, list) and inside and isinstance(inside[0], dict) and "base_model" in inside[0]:
            where, value = ("slices", 0, "base_model"), inside[0]["base_model"]
        if value is None:
            if self.data.get("merge_method") != "linear":
                self._problem((), "base_model is missing; name the model that the others were finetuned from")
            return where, None
        return where, self._reference(value, where)

    def _entries(self) -> tuple[list[tuple[dict[str, Any], Location]], Location | None, tuple[int, int] | None]:
        """Each model's mapping and where it stands; where the slice's own parameters stand; layers and their line."""
        if ("models" in self.data) == ("slices" in self.data):
            if "modules" not in self.data:
                self._problem((), "give models, or one slice with all layers")
            return [], None, None
        if "models" in self.data:
            return self._mappings(self.data["models"], ("models",), ("model", "parameters")), None, None
        slices = self._mappings(self.data["slices"], ("slices",), ("sources", "base_model", "parameters"))
        if len(slices) != 1:
            if slices:
                self._problem(
                    ("slices",), f"{len(slices)} slices make a model of other layers; only whole models are merged here"
                )
            return [], None, None
        where: Location = ("slices", 0, "sources")
        sources = self._mappings(slices[0][0].get("sources"), where, ("model", "layer_range", "parameters"))
        ranges = [(entry.get("layer_range"), (*at, "layer_range")) for entry, at in sources]
        layers = None
        for given, at in ranges:
            if not (
                isinstance(given, list) and len(given) == 2 and all(isinstance(i, int) for i in given) and given[0] == 0
            ):
                self._problem(at, "give [0, number of layers]; only whole models are merged here")
            elif layers is not None and given[1] != layers[0]:
                self._problem(at, f"{given} is not the others' [0, {layers[0]}]; only whole models are merged here")
            else:
                layers = (int(given[1]), self.document.line(at))
        return sources, ("slices", 0, "parameters"), layers

    def _mappings(self, items: Any, where: Location, keys: tuple[str, ...]) -> list[tuple[dict[str, Any], Location]]:
        if not isinstance(items, list) or not items or not all(isinstance(item, dict) for item in items):
            self._problem(where, f"a list of mappings ({', '.join(keys)})")
            return []
        for i, item in enumerate(items):
            self._check_keys(item, (*where, i), keys)
        return [(item, (*where, i)) for i, item in enumerate(items)]

    def _reference(self, value: Any, where: Location) -> ModelReference | None:
        if not isinstance(value, str) or not value.strip():
            self._problem(where, "write the model as text: a directory or owner/name, with +adapter for a LoRA over it")
            return None
        parts = value.split("+")
        if len(parts) > 2 or not all(parts):
            self._problem(where, f"{value!r} is no `model` and no `model+adapter`")
            return None
        return ModelReference(*parts)

    def _section(self, section: Any, where: Location, rules: Rules | None, *, own: bool = False) -> dict[str, OnLine]:
        """One `parameters` mapping, parsed. `own`: a single model's."""
        if section is None or rules is None:
            return {}
        if not isinstance(section, dict):
            self._problem(where, "a mapping of parameters")
            return {}
        found = {}
        for key, value in section.items():
            at = (*where, key)
            if key in rules.idle:
                self.notes.append(f"{key} changes nothing in this method; left out")
            elif key in _FLAGS and key in rules.shared and not own:
                self._flag(key, value, at)
            elif key in rules.own or (key in rules.shared and not own):
                try:
                    found[key] = OnLine(parse_setting(value), self.document.line(at))
                except ValueError as error:
                    self._problem(at, str(error))
            elif key in rules.shared:
                self._problem(at, "has no effect under a model, in mergekit neither; move it to parameters at the top")
            else:
                self._problem(at, f"{self.data['merge_method']} has no such parameter, in mergekit neither; remove it")
        return found

    def _flag(self, key: str, value: Any, where: Location) -> None:
        if not isinstance(value, bool):
            self._problem(where, f"true or false for the whole merge (given: {value!r})")
        else:
            self.flags.setdefault(key, value)  # a slice's own section is read first and goes first

    def _check_models(
        self, models: list[tuple[ModelReference, Location]], base: ModelReference | None, base_where: Location
    ) -> None:
        for i, (one, where) in enumerate(models):
            if one in [other for other, _ in models[:i]]:
                self._problem((*where, "model"), f"{one} is given twice")
        if base_where[0] == "slices" and "base_model" in self.data and str(base) != self.data["base_model"]:
            self._problem(base_where, "is not the base_model at the top; name one")

    def _check_count(self, finetunes: Mapping[str, ModelReference], base: ModelReference | None) -> None:
        slerp = self.data.get("merge_method") == "slerp"
        where: Location = ("models",) if "models" in self.data else ("slices",)
        if slerp and base is not None and len(finetunes) != 1:
            self._problem(where, f"slerp is between base_model and one other model; there are {len(finetunes)} others")
        elif not finetunes and not self.problems:
            self._problem(where, "there is no model beside the base; nothing to merge")

    def _check_rescale(self, rules: Rules | None, rescale: bool) -> None:
        """Only DARE's own has a counterpart; in a sum, leaving it out is a factor on the weights."""
        where: Location = ("parameters", "rescale")
        if rules is not None and rules.method == "ties" and rescale:
            self._problem(where, "ties keeps the largest as they are here; remove the key")
        if rules is not None and rules.method == "dare_ties" and not rescale:
            self._problem(where, "dare_ties always makes up for what it drops here; remove the key")

    def _dtype(self) -> Any:
        """The output's. mergekit computes in `dtype` and writes `out_dtype`; here every sum is fp32."""
        found = {}
        for key in ("out_dtype", "dtype"):
            value = self.data.get(key)
            name = str(value).removeprefix("torch.")
            if value is not None and name not in _DTYPES:
                self._problem((key,), f"{value} cannot be written; there are {', '.join(_DTYPES)}")
            elif value is not None:
                found[key] = name
        if found.get("dtype") in ("bfloat16", "float16"):
            self.notes.append(
                f"dtype {found['dtype']}: computed in fp32 all the same, and rounded once, to what is written"
            )
        return found.get("out_dtype", found.get("dtype"))

    def _vocabulary(self, base: ModelReference | None) -> Vocabulary:
        key = "tokenizer" if "tokenizer" in self.data else "tokenizer_source"
        value = self.data.get(key)
        where: Location = (key,)
        if key == "tokenizer" and isinstance(value, dict):
            for extra in value:
                if extra != "source" and value[extra]:
                    self._problem(
                        (key, extra), "rows are not moved between tokens here; remove it and resize the output instead"
                    )
            value, where = value.get("source", "union"), (key, "source")
        if "tokenizer" in self.data and "tokenizer_source" in self.data:
            self._problem(("tokenizer_source",), "tokenizer says the same; give one of the two")
        if value is None:
            return "error"
        if value == "base" or (base is not None and value == str(base)):
            return "truncate"
        if value == "union":
            self.notes.append("tokenizer union: vocabularies may differ in length here, not in what an id means")
            return "pad"
        self._problem(
            where, f"{value}: the vocabulary is the base's (base) or the longest (union) here, not another model's"
        )
        return "error"


def _name(one: ModelReference, taken: Mapping[str, Any]) -> str:
    """A finetune's name: the last part of its adapter's or its own reference, made unique."""
    last = (one.adapter or one.model).rstrip("/").rsplit("/", 1)[-1].split("@")[0]
    base = "".join(c if c.isalnum() or c in "._-" else "-" for c in last).strip(".-") or "model"
    name, count = base, 1
    while name in taken or name in _TAKEN:
        count += 1
        name = f"{base}-{count}"
    return name

"""What PEFT keeps beside its matrices: in adapter_config.json, or, where diffusers wrote the file, in its header.

Of all that these say only the strength matters here: alpha and rank, which patterns may say anew for some modules.
Facts from huggingface/peft, tuners/lora, tuners/loha and tuners/lokr, and utils/other.py for patterns.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from calotype.checkpoint.files import Weights
from calotype.errors import DamagedFile, LoadError
from calotype.lora.targets import PEFT

MAX_JSON = 2**20  # characters of metadata that are looked into
ALPHAS = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}  # PEFT's kinds that are read, and its name of alpha
REBASED = ("pissa", "olora", "corda", "loftq", "lora_ga")  # first values that take something from the model's weights
NAME = re.compile(r"[\w.-]+")


class Settings:
    """The configurations of a file's components, each by the prefix of its layers."""

    def __init__(self, source: str, configs: Mapping[str, Mapping[str, Any]]) -> None:
        """Raises LoadError for a kind of adapter, or a way to name modules, that is not read."""
        self._source = source
        self._configs = configs
        for config in configs.values():
            kind = config.get("peft_type") or "LORA"
            if kind not in ALPHAS:
                raise LoadError(
                    f"{source}: an adapter of PEFT's kind {kind}, which is not read; those that are: "
                    f"{', '.join(ALPHAS)}. Merge it into its model with PEFT, and give that"
                )
            if config.get("fan_in_fan_out"):
                raise LoadError(f"{source}: fan_in_fan_out is not supported: no layer here is written so")
            begun = str(config.get("init_lora_weights")).lower()
            if begun.startswith(REBASED):
                raise LoadError(
                    f"{source}: begun by {begun}, so that it is for a model whose weights were changed too; save it "
                    "anew with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
                )
        self._patterns = {
            (prefix, field): {self._name(pattern): value for pattern, value in config[field].items()}
            for prefix, config in configs.items()
            for field in ("alpha_pattern", "rank_pattern")
            if isinstance(config.get(field), dict)
        }

    def factor(self, name: str, rank: int) -> float:
        """By what PEFT multiplies a layer's matrices; 1 where nothing is said of its alpha.

        `rank` is that of the matrices, 0 where these are whole: PEFT divides by the rank that was asked for all the
        same. Raises DamagedFile for what is no number.
        """
        for prefix, config in self._configs.items():
            if prefix and not name.startswith(prefix + "."):
                continue
            inner = name.removeprefix(prefix + ".").removeprefix(PEFT)
            field = ALPHAS.get(config.get("peft_type") or "", "lora_alpha" if "lora_alpha" in config else "alpha")
            alpha = self._number(prefix, field, "alpha_pattern", inner)
            rank = rank or int(self._number(prefix, "r", "rank_pattern", inner) or 0)
            if alpha is None or rank < 1:
                return 1.0
            return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        return 1.0

    def _number(self, prefix: str, field: str, pattern: str, module: str) -> float | None:
        """What a component says of a module; of patterns the first that means it counts."""
        own = self._patterns.get((prefix, pattern), {})
        value = next((own[name] for name in own if _means(name, module)), self._configs[prefix].get(field))
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise DamagedFile(f"{self._source}: PEFT's {field} = {value!r} for {module!r} is not a number")
        return float(value)

    def _name(self, pattern: str) -> str:
        """A pattern as the name that it is, with "^" before it where it is the whole of one.

        PEFT takes them for regular expressions. Nearly all are names; what is none is refused, as no file's expression
        is run here, and without it the strength would be wrong.
        """
        name = pattern.removesuffix("$").replace(r"\.", ".")
        if not NAME.fullmatch(name.removeprefix("^")):
            raise LoadError(
                f"{self._source}: PEFT's pattern {pattern[:80]!r} is a regular expression, which is not read; write "
                "the names of the modules in its place"
            )
        return name


def _means(name: str, module: str) -> bool:
    """Whether a name of PEFT's patterns means a module: by its end, or all of it after "^"."""
    return module == name[1:] if name.startswith("^") else module == name or module.endswith("." + name)


def settings(weights: Weights) -> Settings:
    """diffusers keeps PEFT's configuration in the header, by component; PEFT in a file beside."""
    config = json_object(weights.metadata.get("lora_adapter_metadata"))
    if config:
        configs: dict[str, dict[str, Any]] = {}
        for key, value in config.items():
            prefix, _, field = key.rpartition(".")
            configs.setdefault(prefix, {})[field] = value
        return Settings(weights.source, configs)
    for file in weights.files[:1]:
        beside = file.with_name("adapter_config.json")
        if file.stem == "adapter_model" and beside.is_file() and beside.stat().st_size <= MAX_JSON:
            return Settings(str(beside), {"": json_object(beside.read_text(errors="replace"))})
    return Settings(weights.source, {})


def json_object(text: str | None) -> dict[str, Any]:
    """An object of JSON; empty for what is none, or too long."""
    if not text or len(text) > MAX_JSON:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}  # pyright: ignore[reportUnknownVariableType]

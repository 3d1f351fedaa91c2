"""Files of LoRA and its kin: which tensors go together, and the change that they are of one weight.

Every trainer has its own way to write the same few matrices. What a key ends in says which matrix it is, and all that
comes before is the layer's name, spelt in one of the ways that `targets` knows.

    X.lora_down.weight  X.lora_up.weight  X.lora_mid.weight     kohya, OneTrainer
    X.lora_A.weight  X.lora_B.weight  X.lora_A.default.weight   PEFT, diffusers, BFL, AI-toolkit
    X.lora.down.weight  X.lora_linear_layer.down.weight         diffusers before PEFT
    X.processor.to_q_lora.down.weight                           diffusers of early 2023
    double_blocks.0.processor.qkv_lora1.down.weight             XLabs: 1 for the image's stream, 2 for the text's
    double_blocks.0.img_attn.qkv.0.lora_down.weight             OneTrainer: pieces of fused layers, by number
    X.hada_w1_a  X.lokr_w1  X.diff                              LyCORIS
    X.alpha  X.dora_scale  X.lora_magnitude_vector              beside any of them
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from calotype.checkpoint.files import Shape, Weights
from calotype.errors import DamagedFile, SourceNotFound, WrongShape
from calotype.lora.layers import Change, Decomposed, Full, Hadamard, Kronecker, LowRank
from calotype.lora.settings import json_object, settings
from calotype.lora.targets import for_encoder

MAX_RANK = 8192  # beyond the width of any layer here
UNTOLD = ("pytorch_lora_weights", "adapter_model")  # names of files that say nothing: their folders' do
ENDINGS = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")

FIELDS = (
    (re.compile(r"(.+)\.lora_(up|down|mid)\.weight"), {"up": "up", "down": "down", "mid": "mid"}),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.(up|down)\.weight"), {"up": "up", "down": "down"}),
    (re.compile(r"(.+)\.lora(?:_linear_layer)?\.(alpha)"), {"alpha": "alpha"}),
    (re.compile(r"(.+)\.lora_(A|B)(?:\.[\w-]+)?\.weight"), {"A": "down", "B": "up"}),
    (re.compile(r"(.+)\.(lora_magnitude_vector)(?:\.[\w-]+){0,2}"), {"lora_magnitude_vector": "magnitude"}),
    (re.compile(r"(.+)\.(dora_scale|alpha|diff)"), {"dora_scale": "dora_scale", "alpha": "alpha", "diff": "diff"}),
    (re.compile(r"(.+)\.((?:hada_(?:w[12]_[ab]|t[12]))|(?:lokr_(?:w[12](?:_[ab])?|t2)))"), {}),
)
PROCESSOR = re.compile(r"(.+?)(?:\.processor)?\.((?:to|add)_\w+?)_lora\.(up|down|alpha)(?:\.weight)?")
XLABS = re.compile(
    r"((?:(?:diffusion_model|transformer)\.)?(?:double|single)_blocks\.\d+)\.processor\.(qkv|proj)_lora([12]?)\.(up|down)\.weight"
)
XLABS_LAYERS = {
    ("qkv", "1"): "img_attn.qkv",
    ("qkv", "2"): "txt_attn.qkv",
    ("proj", "1"): "img_attn.proj",
    ("proj", "2"): "txt_attn.proj",
    ("qkv", ""): "linear1",
    ("proj", ""): "linear2",
}


def find(file: str | os.PathLike[str]) -> Path:
    """The file that a user means: a path, a folder of diffusers' or PEFT's, or a name in CALOTYPE_HOME/loras, or in a
    folder there.

    Raises SourceNotFound.
    """
    path = Path(file).expanduser()
    if path.is_file():
        return path
    shelf = Path(os.environ.get("CALOTYPE_HOME") or "~/.cache/calotype").expanduser() / "loras"
    inside = (path / f"{stem}{ending}" for stem in UNTOLD for ending in (".safetensors", ".bin"))
    kept = (shelf / f"{path}{ending}" for ending in ("", *ENDINGS))
    below = path.parts and not path.is_absolute() and ".." not in path.parts
    found = next((one for one in (*inside, *(kept if below else ())) if one.is_file()), None)
    if found is not None:
        return found
    if path.is_dir():
        wanted = " or ".join(f"{stem}.safetensors" for stem in UNTOLD)
        raise SourceNotFound(f"{path}: a folder without {wanted}; give a LoRA's file")
    raise SourceNotFound(f"{file}: no such file, and none of that name in {shelf}")


@dataclass(frozen=True)
class Group:
    """All tensors of a file for one layer: their keys by what they are.

    `leading`: only of the layer's first rows, those of q, k and v.
    """

    name: str
    keys: Mapping[str, str]
    leading: bool = False

    @property
    def kind(self) -> str:
        """lora, loha, lokr or full, and dora where there is a magnitude."""
        kind = "full" if "diff" in self.keys else "lora"
        if any(field.startswith("hada_") for field in self.keys):
            kind = "loha"
        elif any(field.startswith("lokr_") for field in self.keys):
            kind = "lokr"
        return kind + ("+dora" if {"magnitude", "dora_scale"} & set(self.keys) else "")


def groups(weights: Weights) -> tuple[dict[str, Group], list[str]]:
    """A file's tensors by the name of their layer, and the keys that are none of an adapter."""
    found: dict[str, dict[str, str]] = {}
    leading: set[str] = set()
    rest: list[str] = []
    for key in weights:
        named = _named(key)
        if named is None:
            rest.append(key)
            continue
        name, field, first_rows = named
        keys = found.setdefault(name, {})
        if field in keys:
            raise DamagedFile(f"{weights.source}: {keys[field]!r} and {key!r} say the same of one layer")
        keys[field] = key
        if first_rows:
            leading.add(name)
    return {name: Group(name, keys, name in leading) for name, keys in found.items()}, rest


def _named(key: str) -> tuple[str, str, bool] | None:
    """A key's layer, what it is of it, and whether it is of its first rows alone."""
    if match := XLABS.fullmatch(key):
        block, what, stream, field = match.groups()
        layer = XLABS_LAYERS.get((what, stream))
        if layer is not None and (stream != "") == ("double" in block):
            return f"{block}.{layer}", field, layer == "linear1"
    if match := PROCESSOR.fullmatch(key):
        place, what, field = match.groups()
        if "text_model." in place or ".encoder.layers." in place:
            what = {"to_out": "out_proj"}.get(what, f"{what.removeprefix('to_')}_proj")
        return f"{place}.{'to_out.0' if what == 'to_out' else what}", field, False
    for pattern, names in FIELDS:
        if match := pattern.fullmatch(key):
            return match[1], names.get(match[2], match[2]), False
    return None


class Reader:
    """Changes of one file's layers, checked against the weights that they are for."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.groups, self.rest = groups(weights)
        self._settings = settings(weights)

    def change(self, group: Group, shape: Shape) -> Change:
        """The change that a group is of a weight of this shape. Its tensors are read, not mapped.

        Raises MissingKeys-like LoadErrors: DamagedFile for an incomplete group or values that are no numbers,
        WrongShape for matrices that make no weight of this shape.
        """
        made = self._inner(group, shape)
        if {"magnitude", "dora_scale"} <= set(group.keys):
            twice = f"{group.keys['magnitude']!r} and {group.keys['dora_scale']!r}"
            raise DamagedFile(f"{self.weights.source}: {twice} both say the lengths of one layer's rows")
        if "magnitude" in group.keys:
            return Decomposed(
                shape=made.shape, factor=1.0, inner=made, magnitude=self._by_row(group, "magnitude", shape)
            )
        if "dora_scale" in group.keys:
            return Decomposed(shape=made.shape, factor=1.0, inner=made, magnitude=self._lengths(group, shape))
        return made

    def _inner(self, group: Group, shape: Shape) -> Change:
        fields = set(group.keys) - {"alpha", "magnitude", "dora_scale"}
        if fields in ({"up", "down"}, {"up", "down", "mid"}):
            return self._low_rank(group, shape)
        if fields == {"diff"}:
            self._require(group, "diff", same_kernel(self._shape(group, "diff"), shape), shape)
            return Full(shape=shape, factor=1.0, difference=self._read(group, "diff").reshape(shape))
        halves = {f"hada_w{n}_{x}" for n in "12" for x in "ab"}
        if fields in (halves, {*halves, "hada_t1", "hada_t2"}):
            return self._hadamard(group, shape, cored="hada_t1" in fields)
        if fields and all(field.startswith("lokr_") for field in fields):
            return self._kronecker(group, shape, fields)
        raise DamagedFile(
            f"{self.weights.source}: for the layer {group.name!r} there are only "
            f"{', '.join(sorted(group.keys.values()))}, which make no adapter; the file is incomplete"
        )

    def _low_rank(self, group: Group, shape: Shape) -> LowRank:
        up, down = self._read(group, "up"), self._read(group, "down")
        rank = up.shape[1] if up.ndim > 1 else 0
        fits = up.ndim in (2, 4) and up.shape[0] == shape[0] and set(up.shape[2:]) <= {1} and self._bounded(rank)
        if "mid" in group.keys:
            mid = self._read(group, "mid")
            fits = fits and mid.ndim == 4 and mid.shape[0] == rank and down.ndim in (2, 4)
            fits = fits and down.shape[0] == mid.shape[1] and set(down.shape[2:]) <= {1}
            self._require(group, "mid", fits, shape)
            down = torch.einsum("rskl,si->rikl", mid.float(), down.flatten(1).float())
        fits = fits and same_kernel(tuple(down.shape), (rank, *shape[1:]))
        self._require(group, "up", fits, shape)
        return LowRank(
            shape=shape,
            factor=self._factor(group, int(self._shape(group, "down")[0])),
            up=up.flatten(1),
            down=down.reshape(rank, *shape[1:]),
        )

    def _hadamard(self, group: Group, shape: Shape, *, cored: bool) -> Hadamard:
        pairs: list[tuple[Tensor, Tensor]] = []
        rank = 0
        for n in "12":
            a, b = self._read(group, f"hada_w{n}_a"), self._read(group, f"hada_w{n}_b")
            name = f"hada_w{n}_a"
            self._require(group, name, a.ndim == 2 and b.ndim == 2 and self._bounded(b.shape[0]), shape)
            rank = b.shape[0]
            if cored:
                core = self._read(group, f"hada_t{n}")
                fits = core.ndim == 4 and core.shape[0] == a.shape[0] and core.shape[1] == rank
                self._require(group, f"hada_t{n}", fits, shape)
                a, b = a.t(), torch.einsum("ijkl,jr->irkl", core.float(), b.float()).flatten(1)
            fits = a.shape[0] == shape[0] and a.shape[1] == b.shape[0] and b.shape[1] == math.prod(shape[1:])
            self._require(group, name, fits, shape)
            pairs.append((a, b))
        rank = self._shape(group, "hada_w1_b")[0]
        return Hadamard(shape=shape, factor=self._factor(group, rank), first=pairs[0], second=pairs[1])

    def _kronecker(self, group: Group, shape: Shape, fields: set[str]) -> Kronecker:
        rank = 0
        halves = {"lokr_w1": {"lokr_w1_a", "lokr_w1_b"}, "lokr_w2": {"lokr_w2_a", "lokr_w2_b"}}
        used: set[str] = set()
        made: dict[str, Tensor] = {}
        for whole, parts in halves.items():
            if whole in fields:
                made[whole] = self._read(group, whole)
                used.add(whole)
                continue
            if not parts <= fields:
                break
            used |= parts
            a, b = self._read(group, f"{whole}_a"), self._read(group, f"{whole}_b")
            fits = a.ndim == 2 and b.ndim in (2, 4) and self._bounded(b.shape[0])
            rank = b.shape[0]
            if whole == "lokr_w2" and "lokr_t2" in fields:
                used.add("lokr_t2")
                core = self._read(group, "lokr_t2")
                fits = fits and core.ndim == 4 and core.shape[:2] == (a.shape[0], rank) and b.ndim == 2
                self._require(group, "lokr_t2", fits, shape)
                made[whole] = torch.einsum("ijkl,jr,ip->prkl", core.float(), b.float(), a.float())
            else:
                self._require(group, f"{whole}_a", fits and a.shape[1] == rank, shape)
                made[whole] = a.float() @ b.flatten(1).float()
        if used != fields or len(made) < 2:
            raise DamagedFile(
                f"{self.weights.source}: for the layer {group.name!r} there are only "
                f"{', '.join(sorted(group.keys.values()))}, which make no LoKr; the file is incomplete"
            )
        outer, inner = made["lokr_w1"], made["lokr_w2"]
        fits = outer.ndim == 2 and inner.ndim in (2, 4) and bool(outer.numel()) and shape[1] % outer.shape[1] == 0
        fits = fits and outer.shape[0] * inner.shape[0] == shape[0]
        fits = fits and outer.shape[1] * math.prod(inner.shape[1:]) == math.prod(shape[1:])
        if fits and inner.ndim == 4:
            fits = same_kernel(tuple(inner.shape), (inner.shape[0], shape[1] // outer.shape[1], *shape[2:]))
        self._require(group, next(iter(sorted(used))), fits, shape)
        inner = inner.reshape(inner.shape[0], shape[1] // outer.shape[1], *shape[2:])
        return Kronecker(shape=shape, factor=self._factor(group, rank), outer=outer, inner=inner)

    def _by_row(self, group: Group, field: str, shape: Shape) -> Tensor:
        given = self._read(group, field)
        self._require(group, field, given.numel() == shape[0], shape)
        return given.reshape(-1, 1)

    def _lengths(self, group: Group, shape: Shape) -> Tensor:
        """LyCORIS' magnitude: of each row (o 1 1 1), or of each input's column (1 i 1 1)."""
        given = self._shape(group, "dora_scale")
        if len(given) > 1 and given[0] == 1 and given[1] == shape[1] and math.prod(given) == shape[1]:
            if shape[0] != 1:
                return self._read(group, "dora_scale").reshape(1, -1)
        elif given[:1] != (shape[0],):
            self._require(group, "dora_scale", False, shape)
        return self._by_row(group, "dora_scale", shape)

    def _factor(self, group: Group, rank: int) -> float:
        """alpha / rank; 1 where the file says nothing of alpha, or there is no rank. `rank` is 0 for whole matrices."""
        if "alpha" not in group.keys:
            return self._settings.factor(group.name, rank)
        if math.prod(self._shape(group, "alpha")) != 1:
            raise WrongShape(f"{self.weights.source}: {group.keys['alpha']!r} is not one number")
        return float(self._read(group, "alpha").reshape(())) / rank if rank else 1.0

    def _bounded(self, rank: int) -> bool:
        return 1 <= rank <= MAX_RANK

    def _shape(self, group: Group, field: str) -> Shape:
        return self.weights[group.keys[field]].shape

    def _read(self, group: Group, field: str) -> Tensor:
        """A tensor's values, in memory: the file may change while they are in use. Finite, of a floating type."""
        key = group.keys[field]
        entry = self.weights[key]
        if not entry.dtype.is_floating_point and field != "alpha":
            raise DamagedFile(f"{self.weights.source}: {key!r} holds {entry.stored}, and no matrix of an adapter")
        kept = entry.dtype in (torch.float16, torch.bfloat16, torch.float32)
        out = torch.empty(entry.shape, dtype=entry.dtype if kept else torch.float32)
        self.weights.read(key, out)
        if out.numel() and not out.sum(dtype=torch.float32).isfinite() and not out.isfinite().all():
            raise DamagedFile(f"{self.weights.source}: {key!r} has values that are no finite numbers")
        return out

    def _require(self, group: Group, field: str, fits: bool, shape: Shape) -> None:
        if not fits:
            listed = ", ".join(f"{key} {self.weights[key].shape}" for key in sorted(group.keys.values()))
            raise WrongShape(
                f"{self.weights.source}: {listed} make no change of a weight of {shape} (found at "
                f"{group.keys[field]!r}); the file is for a model of other sizes, or damaged"
            )


def sides(group: Group, weights: Weights) -> tuple[int, int] | None:
    """How many rows and columns a group's matrices make, from shapes alone; None where they do not show it.

    A convolution's columns are its inputs, or these times its kernel.
    """

    def side(field: str, axis: int) -> int:
        return weights[group.keys[field]].shape[axis]

    core = int(any(field in group.keys for field in ("hada_t1", "lokr_t2")))
    try:
        match group.kind.removesuffix("+dora"):
            case "lora":
                return side("up", 0), side("down", 1)
            case "full":
                return side("diff", 0), side("diff", 1)
            case "loha":
                return side("hada_w1_a", core), side("hada_w1_b", 1)
            case _:
                rows, columns = 1, 1
                for whole in ("lokr_w1", "lokr_w2"):
                    above, beside = (whole, whole) if whole in group.keys else (f"{whole}_a", f"{whole}_b")
                    rows *= side(above, core if above == "lokr_w2_a" else 0)
                    columns *= side(beside, 1)
                return rows, columns
    except (KeyError, IndexError):
        return None


def same_kernel(given: Shape, wanted: Shape) -> bool:
    """Whether a weight's shape is the wanted one: a layer may be written as a convolution of size 1, and the other way
    round.
    """

    def bare(shape: Shape) -> Shape:
        return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape

    return bare(given) == bare(wanted)


@dataclass(frozen=True)
class Summary:
    """What an adapter's file holds: kinds with the number of their layers, ranks likewise, words it was trained on."""

    kinds: dict[str, int]
    ranks: dict[int, int]
    text: int  # layers in text encoders
    words: tuple[str, ...]

    def __str__(self) -> str:
        """lora on 264 layers, 72 of them in text encoders, rank 16; trained words: xyz"""
        kinds = " and ".join(f"{kind} on {count} layers" for kind, count in self.kinds.items())
        kinds += f", {self.text} of them in text encoders" if self.text else ""
        ranks = ", ".join(str(rank) for rank in sorted(self.ranks))
        told = f"{kinds}, rank {ranks}" if ranks else kinds
        return told + (f"; trained words: {', '.join(self.words)}" if self.words else "")


def summary(weights: Weights) -> Summary:
    """What a file holds, from names and shapes."""
    found, _ = groups(weights)
    kinds = Counter(group.kind for group in found.values())
    ranks: Counter[int] = Counter()
    for group in found.values():
        for field in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if field in group.keys and weights[group.keys[field]].shape:
                ranks[weights[group.keys[field]].shape[0]] += 1
                break
    text = sum(for_encoder(name) for name in found)
    return Summary(dict(kinds.most_common()), dict(ranks), text, _words(weights.metadata))


def _words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words that bring a file's subject, as far as its trainer wrote them down: the phrase, else the commonest tags."""
    for key in ("modelspec.trigger_phrase", "trigger_phrase", "trigger_word", "instance_prompt"):
        if metadata.get(key, "").strip():
            return (metadata[key].strip()[:200],)
    counts: Counter[str] = Counter()
    for tags in json_object(metadata.get("ss_tag_frequency")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            if isinstance(tag, str) and isinstance(count, int):
                counts[tag.strip()[:80]] += count
    return tuple(tag for tag, _ in counts.most_common(5) if tag)

"""From a path or a name to a model that runs: detect, build on meta, fill, assemble.

    load("flux1-dev.safetensors", "ae.safetensors", "text_encoder/", "text_encoder_2/")

Nothing is copied that need not be: tensors stored as the network wants them stay views of their files.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from calotype.backends.openvino import require
from calotype.checkpoint.embeddings import read_embedding
from calotype.errors import LoadError, MissingPart, RequestError
from calotype.families.adapters import misfit
from calotype.families.family import Assembly, Family
from calotype.families.unets import UNetModel
from calotype.generate import Model
from calotype.loading.attached import files_of
from calotype.loading.controls import load_control
from calotype.loading.convert import convert
from calotype.loading.describe import Description, PartDescription, describe
from calotype.loading.gather import Chosen, Opened, gather
from calotype.loading.image_prompts import ReaderLoader
from calotype.loading.manifests import manifest, manifests
from calotype.loading.refusals import is_embedding, recognised, refuse_damaged, refuse_incomplete
from calotype.loading.rounding import rounding_error
from calotype.loading.sharing import PROMPTS, Built, digest_of, fingerprint, shared
from calotype.loading.storage import FILE, NONE, asked, keep, kinds, lossy, storage_error, stored_dtype
from calotype.loading.tokenizers import tokenizer_for
from calotype.lora.attach import Adapters
from calotype.lora.targets import Adaptable
from calotype.memory.ladder import RUNGS, Memory, Rung
from calotype.memory.layers import Maker
from calotype.memory.plan import choose as choose_rung
from calotype.nn.quantized import fill_stored

__all__ = ["Description", "PartDescription", "convert", "describe", "load", "manifest", "manifests"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = ("auto", *RUNGS)
BACKENDS = ("torch", "openvino")
Source = str | os.PathLike[str]


def load(
    *sources: Source,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str = "auto",
    backend: str = "torch",
    storage: Mapping[str, str] | str | None = None,
) -> Model[Any]:
    """The model that files, folders or a hub id hold between them, in any order; the built-in one if none is given.

    device   where it computes: "cuda" where there is one, else "cpu"
    dtype    "float32", "bfloat16" or "float16"; None keeps what each part is stored in (fp8 becomes bfloat16), or
             what the model's own calotype.json asks for
    memory   how much of the model is on the device at a time: "resident" all of it, read now; "components" one part;
             "stream" one layer; "auto" the first of these that fits into the memory free now (then weights on the CPU
             stay in their files until they are needed). Pictures are the same on each
    backend  "torch", or "openvino" (the extra calotype[openvino]): the UNet families' steps and decoder on the CPU,
             faster than torch there and equal to rounding; graphs are compiled when a size is first met
    storage  how weights are kept, by part: "int8", "int4" (groups that share a scale), "fp8_e4m3", "fp8_e5m2" (a scale
             a row), as {"transformer": "fp8_e4m3", "t5": "int4"}, or one of them for the backbone and the largest
             encoder; they are widened when used, whatever the dtype, and `Model.storage_errors` holds how far they are
             from what was read. Without it, weights that a file has in float8 or in GGUF's blocks stay so, and are
             widened to the dtype when used; "none" widens them when they are loaded. With "openvino", {"unet": "int8"}
             has the UNet compute in int8, and its error is how far its answers are from torch's: measured on a small
             job when the model is first loaded, and remembered

    Raises a LoadError that says what came, what was wanted and what to do.
    """
    target = _device(device)
    if memory not in MEMORY:
        raise RequestError("memory", memory, "one of " + ", ".join(MEMORY))
    wishes = asked(storage)
    if backend not in BACKENDS:
        raise RequestError("backend", backend, "one of " + ", ".join(BACKENDS))
    eight_bits = False
    if backend == "openvino":
        require()
        if target.type != "cpu":
            raise RequestError("device", str(target), "cpu: the backend openvino computes there")
        eight_bits = _eight_bits(wishes)
    opened = gather(sources)
    wanted = _dtype(opened.card.get("dtype") if dtype is None else dtype)
    family, chosen, configs = recognised(opened)
    clues = opened.clues(chosen[family.backbone.name].found)
    refuse_incomplete(opened, family, chosen, configs, clues)
    try:
        tokenizers = {
            role: tokenizer_for(part, configs[role], opened) for role, part in chosen.items() if part.role.tokenizer
        }
    except MissingPart:
        refuse_damaged(chosen)  # nobody should look for a tokenizer in vain
        raise
    embeddings = _embeddings(opened, family, configs)
    stored = kinds(family, chosen, wishes)
    if backend == "openvino":
        eight_bits = _eight_bits(stored) or eight_bits
        stored["unet"] = NONE  # its graphs hold weights of their own
    read_now = memory == "resident"
    built: dict[str, Built] = {}
    known: dict[str, Hashable] = {}  # encoders, by what they are made of
    for role, part in chosen.items():
        build = partial(_network, part, configs[role], wanted, stored[role], read_now)
        if part.role.tokenizer:
            known[role] = (_content(part), configs[role], wanted, stored[role], str(target), memory)
        whole = read_now or lossy(stored[role])  # whatever the rung will be
        built[role] = shared(known[role], part.found.weights.files, build) if whole and role in known else build()
    networks = {role: one.network for role, one in built.items()}
    rung = choose_rung(networks, target) if memory == "auto" else _rung(memory)
    if backend == "openvino" and rung != "resident":
        rung = "resident"  # its graphs hold weights of their own
    for role, one in built.items():
        complete = partial(_completed, one, target if rung == "resident" else None)
        files = chosen[role].found.weights.files
        built[role] = shared((known[role], rung), files, complete) if role in known else complete()
    networks = {role: one.network for role, one in built.items()}
    model = family.assemble(
        Assembly(
            networks=networks,
            tokenizers=tokenizers,
            embeddings=embeddings,
            clues=clues,
            index=next((source.index for source in opened.sources if source.index), {}),
            card=opened.card,
            source=opened.name,
            device=target,
        )
    )
    adaptable = [
        Adaptable(
            role.name,
            role.folder,
            networks[role.name],
            chosen[role.name].found.part,
            configs[role.name],
            role is family.backbone,
        )
        for role in family.roles
        if role.name in networks and (role is family.backbone or role.tokenizer)
    ]
    model.adapters = Adapters(
        adaptable, lambda: model.memory, family=family.name, advice=partial(misfit, family=family.name)
    )
    model.memory = Memory(
        target,
        rung,
        makers={one.network: one.makers for one in built.values()},
        files=[file for one in built.values() for file in one.files],
    )
    if not embeddings:
        index = next((source.index for source in opened.sources if source.index), {})
        model.content = (family.name, *known.values(), digest_of(sorted(tokenizers.items()), index))
    if backend == "openvino":
        if not isinstance(model, UNetModel):
            raise RequestError("backend", backend, f"torch: OpenVINO runs the UNet families, and not {family.title}")
        model.run_with_openvino(eight_bits=eight_bits)
    lossily = [role for role, kind in stored.items() if lossy(kind) and role in networks]
    errors = {role: storage_error(networks[role], chosen[role], configs[role]) for role in lossily}
    loaded: Model[Any] = Model(
        model,
        storage_errors=errors,
        left_out={role.name: role.optional for role in family.left_out(chosen)},
        prompts=None if model.content is None else PROMPTS,
        controls=lambda source: load_control(source, model, wanted),
        readers=ReaderLoader(model, wanted),
    )
    if eight_bits:
        loaded.storage_errors["unet"] = rounding_error(loaded)
    return loaded


def _eight_bits(wishes: dict[str, str]) -> bool:
    """Whether OpenVINO is asked to compute the UNet in int8, which is then no part that torch stores so."""
    kind = wishes.pop("unet", NONE)
    if kind not in ("int8", NONE, FILE):
        raise RequestError("storage", f"unet={kind}", "int8 for the UNet with the backend openvino")
    return kind == "int8"


def _network(
    part: Chosen,
    config: Any,  # noqa: ANN401
    dtype: torch.dtype | None,
    kind: str,
    read_now: bool,
) -> Built:
    """The part's network in one dtype throughout."""
    found = part.found
    network, binding = found.bind(config)
    dtype = dtype or stored_dtype(found.weights)
    if dtype == torch.float16 and part.role.upcast and found.settings.get("force_upcast", True):
        dtype = torch.float32
    makers: dict[str, Maker] = {}
    fewer = lossy(kind)
    if fewer is not None:
        fill_stored(network, binding.tensors(found.weights, dtype, mapped=False), fewer)
        return Built(network.requires_grad_(False).eval(), makers, files_of(found.weights))
    network.to(dtype)  # on meta: what is read later has its type now
    kept = keep(network, binding, found.weights, dtype, mapped=not read_now) if kind == FILE else frozenset[str]()
    if read_now:
        # All of it: the binding sees to that.
        state = binding.load(found.weights, dtype, mapped=False, without=kept)
        network.load_state_dict(state, strict=False, assign=True)
    else:
        views: dict[str, Tensor] = {}
        for name, value in binding.places(found.weights, dtype, without=kept):
            if isinstance(value, Tensor):
                views[name] = value
            else:
                makers[name] = value
        network.load_state_dict(views, strict=False, assign=True)
    return Built(network.requires_grad_(False).eval(), makers, () if read_now else files_of(found.weights))


def _completed(one: Built, device: torch.device | None) -> Built:
    """The network with all of its weights on a device; as it is where none is given."""
    if device is None:
        return one
    read = {name: make() for name, make in one.makers.items()}
    one.network.load_state_dict(read, strict=False, assign=True)
    return one._replace(network=one.network.requires_grad_(False).to(device), makers={})


def _content(part: Chosen) -> Hashable:
    _, binding = part.found.bind(part.config)
    return id(part.found.part), fingerprint(part.found.weights, binding.resolve(part.found.weights))


def _rung(memory: str) -> Rung:
    return RUNGS[RUNGS.index(memory)]  # pyright: ignore[reportArgumentType]  a name that was checked


def _embeddings(opened: Opened, family: Family, configs: Mapping[str, Any]) -> dict[str, dict[int, Tensor]]:
    """Textual inversion among the sources: vectors by keyword, the file's name without its ending, and by width.

    Raises LoadError for one that no encoder of the model takes.
    """
    widths = [configs[role.name].width for role in family.roles if role.inverted and role.name in configs]
    found: dict[str, dict[int, Tensor]] = {}
    for item in opened.items:
        if not is_embedding(item):
            continue
        weights = item.group.weights
        keyword = weights.files[0].stem
        if keyword.lower() in (name.lower() for name in found):
            raise LoadError(f"two embeddings are called {keyword!r}; rename one of the files")
        found[keyword] = read_embedding(weights)
        if not set(widths) & found[keyword].keys():
            given = " and ".join(map(str, found[keyword]))
            taken = f"takes {' and '.join(map(str, widths))}" if widths else "takes none"
            raise LoadError(
                f"{weights.source}: an embedding of width {given}, but this model of {family.title} {taken}: it was "
                "made for another one"
            )
    return found


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise RequestError("device", device, "cpu, cuda, cuda:0, mps, ...") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RequestError("device", str(device), "cpu: this machine has no CUDA device that torch can use")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise RequestError("device", str(device), "cpu: this machine has no MPS device that torch can use")
    return chosen


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in DTYPES.values()):
        return dtype
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    raise RequestError("dtype", str(dtype), "one of " + ", ".join(DTYPES))

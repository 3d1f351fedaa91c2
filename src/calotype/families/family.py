"""What a family tells the loader: its parts, where they usually come from, and how they become a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from calotype.checkpoint.keys import Extra
from calotype.checkpoint.layouts import Found, Part, Settings
from calotype.errors import DamagedFile, LoadError
from calotype.families.model import FamilyModel
from calotype.request import Defaults


@dataclass(frozen=True, kw_only=True)
class Role:
    """One of the parts that a family's models consist of.

    Several `parts` may play it (a large or a tiny autoencoder). `folder` is its place in a diffusers folder,
    `tokenizer` that of its tokenizer ("" for none), `file` the name of its original file ("" where it has none; `{}` is
    the variant), `settings` are a part's in this family, where a single file says nothing; `where` tells a user who
    lacks it what to look for. Where one part may play several roles, here or in other families, `fits` says which
    configurations are for this one. `upcast` keeps it out of float16, which it overflows; `quantisable` says that
    its matrices may be kept in int8 or int4; `inverted` that prompts may have textual inversion's vectors for it.
    `optional` says, for a part that a model can do without, what it is
    without it; of several such parts a model must have one.
    """

    name: str
    parts: tuple[Part[Any], ...]
    folder: str
    where: str
    tokenizer: str = ""
    file: str = ""
    settings: tuple[tuple[Part[Any], Settings], ...] = ()
    fits: Callable[[Any], bool] | None = None
    upcast: bool = False
    quantisable: bool = False
    inverted: bool = False
    optional: str = ""

    def settings_of(self, part: Part[Any]) -> Settings:
        return next((settings for owner, settings in self.settings if owner is part), {})


@dataclass(frozen=True, kw_only=True)
class Clues:
    """What speaks for a variant beside the backbone's configuration."""

    markers: frozenset[str]  # tensors in the backbone's file that belong to no part
    settings: Settings  # the backbone's own config.json
    scheduler: Settings | None  # scheduler_config.json
    name: str = ""  # of the backbone's file, or of the folder or hub model that it lies in


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything that a model is put together from."""

    networks: Mapping[str, nn.Module]  # by role
    tokenizers: Mapping[str, Any]  # by role, of the kind that the role's encoder has
    embeddings: Mapping[str, Mapping[int, Tensor]]  # textual inversion: by keyword, then by width
    clues: Clues
    index: Settings  # model_index.json
    card: Settings  # calotype.json: a folder's own variant and defaults
    source: str
    device: torch.device

    def embeddings_of(self, width: int) -> dict[str, Tensor]:
        """Textual inversion for an encoder of this width, by keyword."""
        return {keyword: vectors[width] for keyword, vectors in self.embeddings.items() if width in vectors}


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A published file, by a name without spaces. `more` are its tensors outside all parts."""

    name: str
    parts: tuple[ManifestPart, ...]
    more: tuple[Extra, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ManifestPart:
    """A part in a published file, its keys under a prefix.

    `only` keeps the keys that begin with it and takes it off (a file that holds one half of a part); `extras` are
    optional tensors that this file has; `spelt` are pieces of names that it writes otherwise; `undotted` is how the
    latent diffusion repository names its moving averages: by the averaged names without their dots.
    """

    part: Part[Any]
    layout: str
    config: Any
    prefix: str = ""
    only: str = ""
    extras: tuple[str, ...] = ()
    spelt: tuple[tuple[str, str], ...] = ()
    undotted: bool = False


@dataclass(frozen=True, kw_only=True)
class Controls:
    """A family's ControlNets: `misfit` says why a configuration does not go with a backbone's, None where it does."""

    part: Part[Any]
    misfit: Callable[[Any, Any], str | None]


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. The first role is the backbone, by which a model is known to be of the family.

    `variants` are those that people choose between, with their defaults; `variant` names a backbone's configuration;
    `refusal` says why one cannot run; `misfit` says which role's configuration does not go with the others; `harmless`
    are patterns of keys outside all parts; `controls` are its ControlNets.
    """

    name: str
    title: str
    pipeline: str  # diffusers' class
    roles: tuple[Role, ...]
    variants: Mapping[str, Defaults]
    variant: Callable[[Any, Clues], str]
    refusal: Callable[[Any, Clues], str | None]
    misfit: Callable[[Mapping[str, Any]], tuple[str, str] | None]
    scheduler: Callable[[str], dict[str, Any]]
    assemble: Callable[[Assembly], FamilyModel[Any]]
    manifests: tuple[Manifest, ...]
    harmless: tuple[str, ...] = ()
    controls: Controls | None = None

    @property
    def backbone(self) -> Role:
        return self.roles[0]

    def lacking(self, present: Collection[str]) -> tuple[Role, ...]:
        """The roles that nothing plays and a model cannot do without; `present` are the names of the others."""
        some = any(role.optional and role.name in present for role in self.roles)
        return tuple(role for role in self.roles if role.name not in present and not (role.optional and some))

    def left_out(self, present: Collection[str]) -> tuple[Role, ...]:
        """The roles that nothing plays, and a model does without."""
        return tuple(role for role in self.roles if role.optional and role.name not in present)

    def roles_of(self, part: Part[Any]) -> tuple[Role, ...]:
        """The roles that a part may play in this family."""
        return tuple(role for role in self.roles if part in role.parts)

    def taking(self, found: Found[Any]) -> Role | None:
        """The role that a part would play, judged by what it is like."""
        for role in self.roles_of(found.part):
            try:
                if role.fits is None or role.fits(found.config(role.settings_of(found.part))):
                    return role
            except LoadError:  # damaged: it may still be this
                return role
        return None

    def role(self, found: Found[Any], component: str) -> Role | None:
        """The role that a part plays: by its place in a pipeline folder, else by what it is like."""
        roles = self.roles_of(found.part)
        if len(roles) < 2:
            return next(iter(roles), None)
        placed = next((role for role in roles if component and role.folder == component), None)
        if placed is not None:
            return placed
        config = {role.name: found.config(role.settings_of(found.part)) for role in roles}
        return next((role for role in roles if role.fits is None or role.fits(config[role.name])), None)


def whole(name: str, part: Part[Any], layout: str, config: Any, **more: Any) -> Manifest:  # noqa: ANN401
    """The manifest of a file that holds one part."""
    return Manifest(name=name, parts=(ManifestPart(part=part, layout=layout, config=config, **more),))


WHOLE_NUMBERS = frozenset({"width", "height", "steps", "text_tokens", "clip_skip"})


def with_card(family: Defaults, own: Any) -> Defaults:  # noqa: ANN401
    """A family's defaults under those of a folder's calotype.json."""
    settled = {"grain", "samplers", "schedules", "shifts", "sizes", "original_size", "largest"}  # by the network
    known = {field.name for field in fields(family)} - settled
    if not isinstance(own, dict):
        raise DamagedFile("calotype.json: defaults must be an object")
    unknown = sorted(set(own) - known)  # pyright: ignore[reportUnknownArgumentType]
    if unknown:
        raise DamagedFile(f"calotype.json: defaults has {unknown[0]!r}; known are {', '.join(sorted(known))}")
    for name, value in own.items():  # pyright: ignore[reportUnknownVariableType]
        wanted = (str,) if name in ("sampler", "schedule") else (int,) if name in WHOLE_NUMBERS else (int, float)
        if isinstance(value, bool) or not isinstance(value, wanted):
            raise DamagedFile(f"calotype.json: {name} = {value!r} is not of the right kind")
    return replace(family, **own)

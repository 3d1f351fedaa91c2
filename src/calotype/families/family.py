"""What a family tells the loader: its parts, where they usually come from, and how they become a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from calotype.checkpoint.layouts import Part, Settings
from calotype.families.model import FamilyModel
from calotype.text.tokenizers import PromptTokenizer


@dataclass(frozen=True, kw_only=True)
class Role:
    """One of the parts that a family's models consist of.

    Several `parts` may play it (a large or a tiny autoencoder). `folder` is its place in a diffusers folder,
    `tokenizer` that of its tokenizer ("" for none), `file` the name of its original file ("" where it has none; `{}` is
    the variant), `settings` are a part's in this family, where a single file says
    nothing; `where` tells a user who lacks it what to look for.
    """

    name: str
    parts: tuple[Part[Any], ...]
    folder: str
    where: str
    tokenizer: str = ""
    file: str = ""
    settings: tuple[tuple[Part[Any], Settings], ...] = ()

    def settings_of(self, part: Part[Any]) -> Settings:
        return next((settings for owner, settings in self.settings if owner is part), {})


@dataclass(frozen=True, kw_only=True)
class Assembly:
    """Everything that a model is put together from."""

    networks: Mapping[str, nn.Module]  # by role
    tokenizers: Mapping[str, PromptTokenizer]  # by role
    scheduler: Settings | None  # scheduler_config.json
    card: Settings  # calotype.json: a folder's own variant and defaults
    source: str
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A published file, by a name without spaces."""

    name: str
    parts: tuple[ManifestPart, ...]


@dataclass(frozen=True, kw_only=True)
class ManifestPart:
    """A part in a published file, its keys under a prefix.

    `only` keeps the keys that begin with it and takes it off (a file that holds one half of a part); `extras` are
    optional tensors that this file has.
    """

    part: Part[Any]
    layout: str
    config: Any
    prefix: str = ""
    only: str = ""
    extras: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family. The first role is the backbone, by which a model is known to be of the family.

    `variant` names a backbone's configuration; `refusal` says why one cannot run; `misfit` says which role's
    configuration does not go with the others; `harmless` are patterns of keys outside all parts.
    """

    name: str
    title: str
    pipeline: str  # diffusers' class
    roles: tuple[Role, ...]
    variant: Callable[[Any], str]
    refusal: Callable[[Any], str | None]
    misfit: Callable[[Mapping[str, Any]], tuple[str, str] | None]
    scheduler: Callable[[str], dict[str, Any]]
    assemble: Callable[[Assembly], FamilyModel[Any]]
    manifests: tuple[Manifest, ...]
    harmless: tuple[str, ...] = ()

    @property
    def backbone(self) -> Role:
        return self.roles[0]

    def role(self, part: Part[Any]) -> Role | None:
        """The role that a part plays in this family."""
        return next((role for role in self.roles if part in role.parts), None)

"""Fetch the picture sets and the emoji names from the npm registry: `python -m recipes.builtin.fetch`.

Each package is pinned by version and SHA-256; an archive that is already in the cache and matches is not
fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

DATA = Path("build/builtin/data")


@dataclass(frozen=True, kw_only=True)
class Package:
    """One npm package: where it comes from, the hash of its archive, and whose licence the pictures carry."""

    name: str
    version: str
    sha256: str
    licence: str

    @property
    def slug(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}"


FLUENT_3D = Package(
    name="@lobehub/fluent-emoji-3d",
    version="1.1.0",
    sha256="c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    licence="MIT, Copyright (c) Microsoft Corporation (Fluent Emoji)",
)
FLUENT_FLAT = Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
    licence="MIT, Copyright (c) Microsoft Corporation (Fluent Emoji)",
)
NOTO = Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    licence="Apache-2.0, Copyright Google LLC (Noto Emoji)",
)
NAMES = Package(
    name="emojibase-data",
    version="17.0.0",
    sha256="d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    licence="MIT, Copyright (c) Miles Johnson (Emojibase); labels and tags from Unicode CLDR",
)
PACKAGES = (FLUENT_3D, FLUENT_FLAT, NOTO, NAMES)


class FetchError(RuntimeError):
    """A package could not be fetched, or what came is not what the recipe was written for."""


def fetch(package: Package, data: Path = DATA) -> Path:
    """Return the folder of the unpacked package, fetching and unpacking it only when needed."""
    folder = data / package.slug
    if (folder / "package.json").exists():
        return folder
    archive = data / f"{package.slug}.tgz"
    if not archive.exists():
        _download(package, data)
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise FetchError(
            f"{archive}: SHA-256 is {found[:16]}..., wanted {package.sha256[:16]}...; delete the file and try again"
        )
    _unpack(archive, folder)
    return folder


def _download(package: Package, data: Path) -> None:
    """Ask npm, which honours the user's own registry settings, for the archive."""
    data.mkdir(parents=True, exist_ok=True)
    command = ["npm", "pack", "--ignore-scripts", "--silent", f"{package.name}@{package.version}"]
    try:
        subprocess.run(command, cwd=data, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise FetchError("npm was not found; install Node.js, or put the .tgz archives into the data folder") from error
    except subprocess.CalledProcessError as error:
        raise FetchError(f"{' '.join(command)} failed: {error.stderr.strip()[-500:]}") from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files below `package/`; links, devices and paths that leave the folder are refused."""
    root = folder.resolve()
    with tarfile.open(archive, "r:gz") as tar:
        members = [member for member in tar.getmembers() if not member.isdir()]
        # package.json is written last: its presence says that the folder is complete.
        for member in sorted(members, key=lambda m: m.name == "package/package.json"):
            target = (folder / Path(*Path(member.name).parts[1:])).resolve()
            source = tar.extractfile(member) if member.isreg() else None
            if source is None or not target.is_relative_to(root):
                raise FetchError(f"{archive}: refusing to unpack {member.name!r}: not a plain file inside the package")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="cache folder")
    data: Path = parser.parse_args().data
    for package in PACKAGES:
        print(f"{fetch(package, data)}  ({package.licence})")


if __name__ == "__main__":
    main()

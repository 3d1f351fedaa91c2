"""The built-in model's autoencoder: latents fixed by principal components, a TAESD decoder learned for them.

Training an encoder and a decoder together eats hours of a CPU. Here the latents are fixed from the first minute: the
leading principal components of 8x8 pixel blocks. So the decoder, the encoder and the transformer learn independently,
each from a plain regression: latents -> picture, picture -> latents, caption -> latents.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from calotype.nn.tiny_autoencoder import Block, TinyAutoencoder, TinyAutoencoderConfig
from recipes.builtin.fetch import DATA
from recipes.builtin.library import Library, load_library
from recipes.builtin.model import SCALES, Scale
from recipes.builtin.scenes import FREE, compose, sample_scenes

PATCH = 8  # pixels a side of the block behind one latent

Pictures = Callable[[int], Tensor]  # a number -> that many pictures, b 3 h w in 0..1


class Basis(NamedTuple):
    """The linear encoder: latent = (block - mean) @ weight."""

    mean: Tensor  # 192
    weight: Tensor  # 192, z

    def encode(self, picture: Tensor) -> Tensor:
        """b 3 8h 8w in 0..1 -> b z h w of about unit variance."""
        blocks = rearrange(picture, "b c (h p) (w q) -> b h w (c p q)", p=PATCH, q=PATCH)
        return ((blocks - self.mean) @ self.weight).permute(0, 3, 1, 2).contiguous()


def fit_basis(pictures: Pictures, latent_channels: int, batches: int = 24) -> Basis:
    """Principal components of blocks, each divided by its deviation to the power 0.6, then all by one number
    that makes the mean variance 1.

    Full whitening would make the network spend itself on faint detail, none at all would drown colour edges.
    """
    blocks = torch.cat(
        [rearrange(pictures(64), "b c (h p) (w q) -> (b h w) (c p q)", p=PATCH, q=PATCH) for _ in range(batches)]
    ).double()
    mean = blocks.mean(0)
    variance, vectors = torch.linalg.eigh((blocks - mean).T @ (blocks - mean) / len(blocks))
    variance, vectors = variance.flip(0)[:latent_channels], vectors.flip(1)[:, :latent_channels]
    scale = variance.sqrt() ** -0.6
    scale = scale / (variance * scale**2).mean().sqrt()
    return Basis(mean.float(), (vectors * scale).float().contiguous())


def initialise(network: nn.Module) -> None:
    """He initialisation, each residual block starting as the identity."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in network.modules():
        if isinstance(module, Block):
            nn.init.zeros_(module.conv3.weight)


def picture_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """L1 + 2 MSE + half the L1 of horizontal and vertical differences (edges are what the eye looks for)."""
    loss = F.l1_loss(made, wanted) + 2 * F.mse_loss(made, wanted)
    for axis in (-1, -2):
        loss = loss + 0.5 * F.l1_loss(made.diff(dim=axis), wanted.diff(dim=axis))
    return loss


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Decibels, pictures in 0..1, clipped first."""
    return float(-10 * torch.log10(F.mse_loss(made.clamp(0, 1), wanted)))


def fit(
    config: TinyAutoencoderConfig,
    basis: Basis,
    pictures: Pictures,
    device: torch.device,
    *,
    decoder_seconds: float,
    encoder_seconds: float,
    batch: int,
    crop: int,
    rate: float = 1e-3,
    report: Callable[[str], None] = print,
) -> TinyAutoencoder:
    """Learn the decoder, then the encoder, each for the given time; the learning rate decays over the last 60 %."""
    network = TinyAutoencoder(config).to(device)
    network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  half again as fast on a CPU
    initialise(network)
    held_out = pictures(64)
    latents = basis.encode(held_out)

    def crops() -> tuple[Tensor, Tensor]:
        """A batch of pictures cut on the latent grid, and their latents."""
        picture = pictures(batch)
        row, column = (int(torch.randint(0, (picture.shape[-1] - crop) // PATCH + 1, ())) * PATCH for _ in "hw")
        picture = picture[..., row : row + crop, column : column + crop]
        return picture, basis.encode(picture)

    def train(part: nn.Module, seconds: float, loss_of: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
        optimizer = torch.optim.AdamW(part.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=1e-4)
        started, told, step = time.monotonic(), 0.0, 0
        while (spent := time.monotonic() - started) < seconds:
            share = spent / seconds
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 50, (1 - share) / 0.6 + 0.01)
            loss = loss_of(*crops())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            step += 1
            if spent - told > 20:
                told = spent
                with torch.inference_mode():
                    quality = psnr(network.decode(latents), held_out)
                report(f"{name} {spent:.0f} s, step {step}: loss {loss:.4f}, {quality:.2f} dB")

    train(
        network.decoder,
        decoder_seconds,
        lambda picture, latent: picture_loss(network.decoder(latent + 0.03 * torch.randn_like(latent)), picture),
        "decoder",
    )
    train(
        network.encoder,
        encoder_seconds,
        lambda picture, latent: F.mse_loss(network.encoder(picture), latent),
        "encoder",
    )
    return network


def scene_pictures(library: Library, scale: Scale, device: torch.device, seed: int) -> Pictures:
    """Training pictures of the freest scenes, in 0..1."""
    rng = np.random.default_rng(seed)

    def pictures(count: int) -> Tensor:
        scenes = sample_scenes(rng, count, FREE, library.objects)
        return compose(scenes, library, scale.pixels, device) / 2 + 0.5

    return pictures


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--scale", choices=sorted(SCALES), default="cpu")
    arguments.add_argument("--data", type=Path, default=DATA)
    arguments.add_argument("--device", default="cpu")
    given = arguments.parse_args()
    scale, device = SCALES[given.scale], torch.device(given.device)
    torch.manual_seed(0)
    library = load_library(given.data, size=scale.pixels, large=scale.large).to(device)
    pictures = scene_pictures(library, scale, device, seed=1)
    folder = given.data / given.scale
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "basis.safetensors").exists():  # what is trained on a basis stays with it
        basis = fit_basis(pictures, scale.vae.latent_channels)
        save_file({"mean": basis.mean.cpu(), "weight": basis.weight.cpu()}, folder / "basis.safetensors")
    basis = load_basis(folder, device)
    network = fit(
        scale.vae,
        basis,
        pictures,
        device,
        decoder_seconds=scale.decoder_seconds,
        encoder_seconds=scale.encoder_seconds,
        batch=8 if device.type == "cpu" else 128,
        crop=scale.pixels // 2,
    )
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        folder / "vae.safetensors",
    )


def load_basis(folder: Path, device: torch.device) -> Basis:
    """The basis that `main` wrote."""
    tensors = load_file(folder / "basis.safetensors")
    return Basis(tensors["mean"].to(device), tensors["weight"].to(device))


if __name__ == "__main__":
    main()

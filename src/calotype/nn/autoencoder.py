"""The KL autoencoder of latent diffusion (Rombach et al. 2022): pictures to latents at an eighth of the size."""

# b batch · c channels · h height · w width

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from calotype.nn.attention import attention
from calotype.nn.conv import Conv2d
from calotype.nn.linear import Linear

GROUPS = 32


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """latent = (z - shift) * scale, with z the mean of the encoder's Gaussian.

    `widths` are the channels of each level, full resolution first; each level but the last halves the size.
    """

    latent_channels: int
    widths: tuple[int, ...]
    blocks: int
    quant_convs: bool
    scale: float
    shift: float

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.widths) - 1)


class ResidualBlock(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(GROUPS, width_in, eps=1e-6)
        self.conv1 = Conv2d(width_in, width, 3, padding=1)
        self.norm2 = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.conv2 = Conv2d(width, width, 3, padding=1)
        self.shortcut = Conv2d(width_in, width, 1) if width_in != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.shortcut is None else self.shortcut(x))


class SpatialAttention(nn.Module):
    """One head over all positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(GROUPS, width, eps=1e-6)
        self.q = Linear(width, width)
        self.k = Linear(width, width)
        self.v = Linear(width, width)
        self.out = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = rearrange(self.norm(x), "b c h w -> b 1 (h w) c")
        mixed = self.out(attention(self.q(tokens), self.k(tokens), self.v(tokens)))
        return x + rearrange(mixed, "b (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ResidualBlock(width, width)
        self.attention = SpatialAttention(width)
        self.second = ResidualBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.attention(self.first(x)))


class EncoderLevel(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        self.down = None if last else Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        # Padded on the right and below only, as the original is.
        return x if self.down is None else self.down(F.pad(x, (0, 1, 0, 1)))


class DecoderLevel(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, last: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(width if i else width_in, width) for i in range(blocks))
        self.up = None if last else Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.up is None else self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Encoder(nn.Module):
    """b 3 h w in -1..1 -> mean and log variance, b 2z h/8 w/8."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv_in = Conv2d(3, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            EncoderLevel(widths[max(i - 1, 0)], width, config.blocks, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.middle = Middle(widths[-1])
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.middle(x))))


class Decoder(nn.Module):
    """b z h/8 w/8 -> b 3 h w, about -1..1. `levels` run from the deepest to full resolution."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.middle = Middle(widths[0])
        self.levels = nn.ModuleList(
            DecoderLevel(widths[max(i - 1, 0)], width, config.blocks + 1, last=i == len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(GROUPS, widths[-1], eps=1e-6)
        self.conv_out = Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.middle(self.conv_in(z))
        for level in self.levels:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Autoencoder(nn.Module):
    """Encoder and decoder between pictures (b 3 h w, 0..1) and scaled latents (b z h/8 w/8)."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        z = config.latent_channels
        self.quant = Conv2d(2 * z, 2 * z, 1) if config.quant_convs else None
        self.post_quant = Conv2d(z, z, 1) if config.quant_convs else None

    def encode(self, picture: Tensor) -> Tensor:
        """The mean of the latent Gaussian, scaled; float32."""
        moments = self.encoder((picture * 2 - 1).to(self.decoder.conv_in.weight.dtype))
        if self.quant is not None:
            moments = self.quant(moments)
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return (mean.float() - self.config.shift) * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a scaled latent; float32, not clipped."""
        z = (latent / self.config.scale + self.config.shift).to(self.decoder.conv_in.weight.dtype)
        if self.post_quant is not None:
            z = self.post_quant(z)
        picture: Tensor = self.decoder(z)
        return picture.float() / 2 + 0.5


def preview_projection(autoencoder: Autoencoder, seed: int = 0) -> Tensor:
    """A linear map from latents to small pictures, fitted to the decoder itself: (z + 1, 3), bias in the last row.

    Decodes a few smooth random latents once and solves least squares from each latent pixel to the mean colour of
    its 8x8 patch. Cheap, needs no table of constants, and fits fine-tuned autoencoders too.
    """
    z = autoencoder.config.latent_channels
    weight = autoencoder.decoder.conv_in.weight
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.randn(8, z, 3, 3, generator=rng)
    latent = F.interpolate(coarse, size=(8, 8), mode="bilinear") * 1.5
    with torch.inference_mode():
        picture = autoencoder.decode(latent.to(weight.device)).cpu()
    colour = rearrange(F.avg_pool2d(picture, picture.shape[-1] // 8), "b c h w -> (b h w) c")
    rows = rearrange(latent, "b z h w -> (b h w) z")
    rows = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
    return torch.linalg.lstsq(rows, colour).solution

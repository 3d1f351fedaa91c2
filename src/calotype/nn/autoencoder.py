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
from calotype.nn.strips import (
    Affine,
    Computed,
    Convolved,
    Moments,
    Upsampled,
    convolved,
    halved,
    in_strips,
    lent,
    moments_of,
    plus,
    rows_of,
    strips_of,
    written,
)

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

    def in_strips(self, x: Tensor, known: Moments, *, twice: bool = False) -> tuple[Tensor, Moments]:
        """`forward` of a tensor whose moments are known, and the result's; x is written over where its width stays.

        With `twice` the first convolution is computed once for its moments and again for its values, and nothing but
        x is held.
        """
        height, width = x.shape[2], self.conv2.out_channels
        rows = rows_of(x, max(x.shape[1], width))
        first, kernel = known.affine(self.norm1), lent(self.conv1)
        if twice and self.shortcut is None:
            between = Moments(GROUPS)
            for strip in convolved(strips_of(x, rows), kernel, height, first):
                between.add(strip)
            again = convolved(strips_of(x, rows), kernel, height, first)
            made = convolved(again, lent(self.conv2), height, between.affine(self.norm2))
            return x, written(x, plus(made, lambda start, stop: x[:, :, start:stop]), GROUPS)
        y = x.new_empty(x.shape[0], width, height, x.shape[3])
        between = written(y, convolved(strips_of(x, rows), kernel, height, first), GROUPS)
        made = convolved(strips_of(y, rows), lent(self.conv2), height, between.affine(self.norm2))
        if self.shortcut is None:
            return x, written(x, plus(made, lambda start, stop: x[:, :, start:stop]), GROUPS)
        skip = lent(self.shortcut)

        def skipped(start: int, stop: int) -> Tensor:
            return F.conv2d(x[:, :, start:stop].to(skip.weight.dtype), skip.weight, skip.bias)

        return y, written(y, plus(made, skipped), GROUPS)

    def of_computed(self, x: Computed) -> tuple[Tensor, Moments]:
        """`forward` of a tensor that is never held, and the result's moments."""
        b, width_in, height, w = x.shape
        width = self.conv2.out_channels
        y = x.of.new_empty(b, width, height, w)
        rows = rows_of(y, max(width_in, width))
        first = x.moments(GROUPS, rows).affine(self.norm1)
        between = written(y, convolved(x.strips(rows), lent(self.conv1), height, first), GROUPS)
        skip = x if self.shortcut is None else x.then(lent(self.shortcut))
        made = convolved(strips_of(y, rows), lent(self.conv2), height, between.affine(self.norm2))
        return y, written(y, plus(made, skip.rows), GROUPS)


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

    def in_strips(self, x: Tensor, known: Moments) -> tuple[Tensor, Moments]:
        x, _ = self.first.in_strips(x, known)
        x = self.attention(x)
        return self.second.in_strips(x, moments_of(x, GROUPS))


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

    def in_strips(self, picture: Tensor) -> Tensor:
        """`forward` with less held: at most about the first level's tensor."""
        x, known = picture, Moments(GROUPS)
        for level in self.levels:
            assert isinstance(level, EncoderLevel)
            first = level is self.levels[0]
            for number, block in enumerate(level.blocks):
                assert isinstance(block, ResidualBlock)
                if first and number == 0:
                    x, known = block.of_computed(Convolved(x, lent(self.conv_in)))
                else:
                    x, known = block.in_strips(x, known, twice=first)
            if level.down is not None:
                x, known = halved_whole(level.down, x)
        x, known = self.middle.in_strips(x, known)
        return convolved_whole(self.conv_out, x, known.affine(self.norm_out))[0]


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

    def in_strips(self, z: Tensor) -> Tensor:
        """`forward` with less held: at most about the last level's tensor and what it is made of.

        The last level's input, the widest tensor of all, is computed three times in parts and never held. Upsampling
        as `Upsampled` does it saves what this and `twice` cost.
        """
        x, known = convolved_whole(self.conv_in, z)
        x, known = self.middle.in_strips(x, known)
        up: Conv2d | None = None
        for level in self.levels:
            assert isinstance(level, DecoderLevel)
            last = level is self.levels[-1]
            for number, block in enumerate(level.blocks):
                assert isinstance(block, ResidualBlock)
                if number or up is None:
                    x, known = block.in_strips(x, known, twice=last)
                elif last:
                    x, known = block.of_computed(Upsampled(x, lent(up)))
                else:
                    x, known = upsampled_whole(up, x)
                    x, known = block.in_strips(x, known)
            up = level.up
        return convolved_whole(self.conv_out, x, known.affine(self.norm_out))[0]


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
        given = (picture * 2 - 1).to(self.decoder.conv_in.weight.dtype)
        if in_strips(self, picture, 1):
            with torch.no_grad():
                moments = self.encoder.in_strips(given)
        else:
            moments = self.encoder(given)
        if self.quant is not None:
            moments = self.quant(moments)
        mean: Tensor = moments.chunk(2, dim=1)[0]
        return (mean.float() - self.config.shift) * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a scaled latent; float32, not clipped."""
        z = (latent / self.config.scale + self.config.shift).to(self.decoder.conv_in.weight.dtype)
        if self.post_quant is not None:
            z = self.post_quant(z)
        if in_strips(self, latent, self.config.factor):
            with torch.no_grad():
                picture = self.decoder.in_strips(z)
        else:
            picture = self.decoder(z)
        return picture.float() / 2 + 0.5


def convolved_whole(layer: Conv2d, x: Tensor, before: Affine | None = None) -> tuple[Tensor, Moments]:
    """A convolution of a tensor strip by strip, and the result's moments unless it is the last layer."""
    b, c, height, w = x.shape
    out = x.new_empty(b, layer.out_channels, height, w)
    strips = convolved(strips_of(x, rows_of(x, max(c, layer.out_channels))), lent(layer), height, before)
    return out, written(out, strips, GROUPS if before is None else None)


def halved_whole(layer: Conv2d, x: Tensor) -> tuple[Tensor, Moments]:
    b, c, h, w = x.shape
    small = x.new_empty(b, c, h // 2, w // 2)
    return small, written(small, halved(x, lent(layer), rows_of(small, 2 * c)), GROUPS)


def upsampled_whole(layer: Conv2d, small: Tensor) -> tuple[Tensor, Moments]:
    x = Upsampled(small, lent(layer))
    out = small.new_empty(x.shape)
    return out, written(out, x.strips(rows_of(out, 2 * x.channels)), GROUPS)


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

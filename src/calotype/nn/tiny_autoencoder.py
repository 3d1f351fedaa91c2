"""The tiny autoencoder (TAESD, Ollin Boer Bohan 2023): plain residual convolutions, no norms, no attention.

For previews, for fast decoding, and as the built-in model's own autoencoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calotype.nn import strips
from calotype.nn.strips import Kept, Strips, convolved, enlarged, in_strips, lent, plus, relu, strided


@dataclass(frozen=True, kw_only=True)
class TinyAutoencoderConfig:
    """One width throughout; `encoder_blocks` and `decoder_blocks` count the residual blocks of each level.

    latent = (z - shift) * scale as for the large autoencoder. TAESD itself: width 64, (1, 3, 3, 3) and (3, 3, 3, 1).
    """

    latent_channels: int
    width: int
    encoder_blocks: tuple[int, ...]
    decoder_blocks: tuple[int, ...]
    scale: float
    shift: float

    @property
    def factor(self) -> int:
        """Pixels a side of one latent."""
        return 2 ** (len(self.encoder_blocks) - 1)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv2(F.relu(self.conv1(x))))
        return F.relu(self.conv3(y) + x)

    def in_strips(self, x: Strips, height: int) -> Strips:
        kept = Kept(x)
        y = relu(convolved(kept.passing(), lent(self.conv1), height))
        y = relu(convolved(y, lent(self.conv2), height))
        return relu(plus(convolved(y, lent(self.conv3), height), kept.take))


class Encoder(nn.Module):
    """b 3 h w in 0..1 -> b z h/8 w/8."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = []
        for level, blocks in enumerate(config.encoder_blocks):
            layers.append(
                nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False)
                if level
                else nn.Conv2d(3, width, 3, padding=1)
            )
            layers.extend(Block(width) for _ in range(blocks))
        layers.append(nn.Conv2d(width, config.latent_channels, 3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(nn.Module):
    """b z h/8 w/8 -> b 3 h w in about 0..1."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        width = config.width
        layers: list[nn.Module] = [nn.Conv2d(config.latent_channels, width, 3, padding=1), nn.ReLU()]
        for level, blocks in enumerate(config.decoder_blocks):
            last = level == len(config.decoder_blocks) - 1
            layers.extend(Block(width) for _ in range(blocks))
            if not last:
                layers.append(nn.Upsample(scale_factor=2))
            layers.append(nn.Conv2d(width, 3 if last else width, 3, padding=1, bias=last))
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(squashed(z))


def squashed(z: Tensor) -> Tensor:
    """Outliers softly so: latents reach about +-3."""
    return torch.tanh(z / 3) * 3


def sequence_in_strips(layers: nn.Sequential, x: Tensor, rows: int) -> Tensor:
    """A sequence of these layers of x, of which a few rows are in it at a time; float32.

    Nothing is computed twice, and no layer's result is held but the last one's.
    """
    height, width = x.shape[2:]
    made: Strips = iter(x.split(rows, dim=2))
    channels = 0
    for layer in layers:
        if isinstance(layer, Block):
            made = layer.in_strips(made, height)
        elif isinstance(layer, nn.Upsample):
            made, height, width = enlarged(made, 2), 2 * height, 2 * width
        elif isinstance(layer, nn.ReLU):
            made = relu(made)
        else:
            assert isinstance(layer, nn.Conv2d)
            channels = layer.out_channels
            if layer.stride == (2, 2):
                made, height, width = strided(made, lent(layer), height), (height + 1) // 2, (width + 1) // 2
            else:
                made = convolved(made, lent(layer), height)
    out = torch.empty(x.shape[0], channels, height, width, device=x.device)
    strips.written(out, made)
    return out


class TinyAutoencoder(nn.Module):
    """Encoder and decoder between pictures (b 3 h w, 0..1) and scaled latents (b z h/8 w/8)."""

    def __init__(self, config: TinyAutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, picture: Tensor) -> Tensor:
        """Scaled latents; float32."""
        dtype = next(self.encoder.parameters()).dtype
        if in_strips(self, picture, 1):
            with torch.no_grad():
                z = sequence_in_strips(self.encoder.layers, picture.to(dtype), self._rows(picture, 1))
        else:
            z = self.encoder(picture.to(dtype))
        return (z.float() - self.config.shift) * self.config.scale

    def decode(self, latent: Tensor) -> Tensor:
        """The picture of a scaled latent; float32, not clipped."""
        dtype = next(self.decoder.parameters()).dtype
        z = (latent / self.config.scale + self.config.shift).to(dtype)
        if in_strips(self, latent, self.config.factor):
            with torch.no_grad():
                picture = sequence_in_strips(self.decoder.layers, squashed(z), self._rows(latent, self.config.factor))
        else:
            picture = self.decoder(z)
        return picture.float()

    def _rows(self, x: Tensor, factor: int) -> int:
        """How many of x make a strip of the widest layer, where a pixel of x is `factor` squared there."""
        return max(strips.STRIP // (x.shape[0] * self.config.width * x.shape[3] * factor**2), 1)

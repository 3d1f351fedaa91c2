"""Drawing in batches is what the engine does one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import VAE, flux_model
from torch.testing import assert_close

from calotype.image import to_tensor
from recipes.builtin.autoencoder import fit_basis
from recipes.builtin.draw import (
    COMMON,
    FREEDOM,
    HARD,
    LinearAutoencoder,
    Settings,
    batch,
    open_state,
    pictures,
    sheet,
)
from recipes.builtin.model import CPU, Networks
from recipes.builtin.objects import load_objects


@pytest.mark.parametrize("cfg_scale", [1.0, 2.5])
def test_batches_draw_what_the_engine_draws(cfg_scale: float) -> None:
    model = flux_model(guidance=False)
    settings = Settings(steps=3, cfg_scale=cfg_scale)
    prompts, seeds = ["a red fox", "a cat in the snow", "a red fox"], [5, 6, 7]
    together = batch(model, prompts, seeds, settings, size=2)
    for drawn, prompt, seed in zip(together, prompts, seeds, strict=True):
        alone = to_tensor(pictures(model, settings.request(prompt, seed))[0])
        assert_close(drawn, alone, atol=1 / 255, rtol=0)  # the engine's is rounded to bytes


def test_prompts_name_known_objects() -> None:
    words = {word for thing in load_objects() for word in (thing.name, thing.plural, *thing.synonyms) if word}
    assert len(COMMON) == 24 and len(HARD) == 16 and len(FREEDOM) == 6
    for prompt in (*COMMON, *FREEDOM):
        bare = prompt.split(" on ")[0]
        assert any(f" {word} " in f" {bare} " for word in words), prompt


def test_sheets_hold_every_picture() -> None:
    made = sheet(flux_model(guidance=False), ["a fox", "a cat"], 3, Settings(steps=1, cfg_scale=1.0), columns=3)
    assert made.size == (3 * (32 + 6), 2 * (32 + 32))


def test_the_linear_decoder_inverts_the_basis() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-0.2, 0.2, 8).repeat(2)

    def made(count: int) -> torch.Tensor:
        """Blocks of any colour with a ramp of any strength: four components say all."""
        return torch.rand(count, 3, 1, 1) + torch.randn(count, 1, 1, 1) * ramp.expand(count, 3, 16, 16)

    shown = made(8)
    vae = LinearAutoencoder(VAE, fit_basis(made, 4, batches=2))
    assert_close(vae.decode(vae.encode(shown)), shown, atol=1e-3, rtol=0)


def test_a_state_without_decoder_says_what_to_do(tmp_path: Path) -> None:
    torch.save({"averaged": Networks(CPU).state_dict(), "step": 1}, tmp_path / "state.pt")
    with pytest.raises(FileNotFoundError, match="--linear"):
        open_state(tmp_path, CPU)

"""One call from a prompt to a large picture, for each family: DiffSynth-Studio's recipes of 2024.

    python examples/high_resolution.py sdxl --model sd_xl_base_1.0.safetensors
    python examples/high_resolution.py sd1 --model v1-5-pruned-emaonly.safetensors \\
        --tile control_v11f1e_sd15_tile.pth --lineart control_v11p_sd15_lineart.pth

The picture is drawn at the family's own size, then enlarged and drawn over, once or several times, in tiles where the
family needs it. Stable Diffusion 1.x goes up to 4096, best led by two ControlNets that look at the smaller picture's
shape; SDXL Turbo makes a second picture from the first. `--scale 0.25` tries a recipe at a quarter of its sizes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import calotype

PROMPT = "a lighthouse on a rocky coast, waves, golden evening light, highly detailed"
NEGATIVE = "blurry, low quality"


def passes(*each: tuple[int, float, int, bool]) -> list[dict[str, Any]]:
    """Side, strength, steps, in tiles or not."""
    return [{"width": n, "height": n, "strength": s, "steps": k, "tiled": t} for n, s, k, t in each]


RECIPES: dict[str, dict[str, Any]] = {
    "sd1": {
        "width": 512,
        "height": 512,
        "steps": 80,
        "cfg_scale": 7.5,
        "high_res": passes((1024, 0.7, 40, False), (2048, 0.7, 20, False), (4096, 0.5, 10, True)),
        "tile_size": 1024,
        "tile_stride": 512,
    },
    "sdxl": {"width": 1024, "height": 1024, "cfg_scale": 6, "steps": 60, "high_res": passes((2048, 0.5, 60, False))},
    "sd3": {"width": 1024, "height": 1024, "cfg_scale": 7.5, "steps": 50, "high_res": passes((2048, 0.5, 50, True))},
    "kolors": {"width": 1024, "height": 1024, "cfg_scale": 4, "steps": 50, "high_res": passes((2048, 0.4, 50, False))},
    "hunyuan_dit": {"width": 1024, "height": 1024, "steps": 50, "high_res": passes((2048, 0.4, 50, True))},
    "flux": {"width": 1024, "height": 1024, "steps": 30, "high_res": passes((2048, 0.6, 30, True))},
    "turbo": {"width": 512, "height": 512, "steps": 1, "cfg_scale": 1},
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("family", choices=tuple(RECIPES))
    arguments.add_argument("--model", action="append", default=[], metavar="SOURCE", help="repeat it for parts")
    arguments.add_argument("--prompt", default=PROMPT)
    arguments.add_argument("--seed", type=int, default=7)
    arguments.add_argument("--scale", type=float, default=1.0, help="of all sizes, to try a recipe out")
    arguments.add_argument("--tile", metavar="FILE", help="sd1: a ControlNet for tiles")
    arguments.add_argument("--lineart", metavar="FILE", help="sd1: a ControlNet for line drawings")
    arguments.add_argument("--out", type=Path, default=Path("lighthouse.png"))
    given = arguments.parse_args()
    model = calotype.load(*given.model)
    fields = scaled(RECIPES[given.family], given.scale, model.family.defaults.grain)
    print(f"{model.name}: {fields}")
    led = [
        calotype.Control(kind=kind, model=file, scale=scale)  # by the picture that is there when the pass begins
        for kind, file, scale in (("tile", given.tile, 0.5), ("lineart", given.lineart, 0.7))
        if file
    ]
    if led:
        fields["high_res"] = [{**each, "controls": led} for each in fields["high_res"]]
    picture = draw(model, calotype.Request(prompt=given.prompt, negative_prompt=NEGATIVE, seed=given.seed, **fields))
    if given.family == "turbo":
        second = given.prompt.replace("golden evening", "cold winter")
        picture = draw(model, calotype.Request(prompt=second, seed=given.seed, input_image=picture, **fields))
    calotype.save(picture, given.out)
    print(f"{given.out}: {picture.width} x {picture.height}")


def scaled(recipe: dict[str, Any], scale: float, grain: int) -> dict[str, Any]:
    """The recipe at a fraction of its sizes."""

    def near(side: int) -> int:
        return max(round(side * scale / grain), 1) * grain

    sizes = ("width", "height", "tile_size", "tile_stride")
    made = {name: near(value) if name in sizes else value for name, value in recipe.items()}
    stages = [
        {**stage, "width": near(stage["width"]), "height": near(stage["height"])} for stage in made.get("high_res", ())
    ]
    return {**made, "high_res": stages} if stages else made


def draw(model: Any, request: calotype.Request) -> Any:
    for event in model.stream(request):
        if isinstance(event, calotype.Picture):
            return event.image
        if isinstance(event, calotype.Progress):
            print(f"stage {event.stage + 1} of {event.stages}, step {event.step} of {event.steps}", flush=True)
    raise AssertionError("the stream ended before its picture")


if __name__ == "__main__":
    main()

"""Calotype and DiffSynth-Studio 1.1.9 on the same file: do CLIP, UNet, decoder and the finished picture agree?

    python benchmarks/against_diffsynth.py --folder FOLDER [--side 512] [--steps 3] [--save]

Stable Diffusion 1.5 at its real size, random float32 weights in one file, the same noise, DDIM over DiffSynth's
levels (here: sampler "ddim", schedule "linspace"), cfg 7.5. What runs on its side is its own code: pipeline, prompter,
scheduler, networks, and its own conversion of the file's keys. Only its packages' __init__ files are not executed:
they import all of its families, which fails under transformers 5. Names that the pipeline's module imports for features
that are not used here (ControlNet, IP-Adapter, its model manager) are empty classes.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from datetime import date
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import torch
from measuring import command, commit, keep, machine, versions
from random_models import sd1
from torch import Tensor

import calotype
from calotype.families.sd1 import Sd1Model

PROMPT, NEGATIVE = "a red fox in the snow, oil on canvas", "blurry"
CFG, SEED = 7.5, 7
UNUSED = {
    "models": ("SDIpAdapter", "IpAdapterCLIPImageEmbedder"),
    "models.model_manager": ("ModelManager",),
    "controlnets": ("MultiControlNetManager", "ControlNetUnit", "ControlNetConfigUnit", "Annotator"),
}
USED = {
    "models": {
        "SDTextEncoder": "sd_text_encoder",
        "SDUNet": "sd_unet",
        "SDVAEDecoder": "sd_vae_decoder",
        "SDVAEEncoder": "sd_vae_encoder",
        "SDMotionModel": "sd_motion",
        "SDXLMotionModel": "sdxl_motion",
        "SDXLUNet": "sdxl_unet",
    },
    "schedulers": {"EnhancedDDIMScheduler": "ddim"},
    "prompters": {"SDPrompter": "sd_prompter"},
}


def diffsynth_pipeline() -> type[Any]:
    """DiffSynth's SDImagePipeline, without the __init__ files of its packages."""
    found = importlib.util.find_spec("diffsynth")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("pip install diffsynth==1.1.9 --no-deps")
    root = Path(found.submodule_search_locations[0])
    for name in ("", "models", "schedulers", "prompters", "controlnets", "pipelines"):
        package(".".join(filter(None, ("diffsynth", name))), root / name)
    for place, names in UNUSED.items():
        stand_in(f"diffsynth.{place}", names)
    for place, classes in USED.items():
        for name, module in classes.items():
            own = importlib.import_module(f"diffsynth.{place}.{module}")
            setattr(sys.modules[f"diffsynth.{place}"], name, getattr(own, name))
    with torchvision():
        return importlib.import_module("diffsynth.pipelines.sd_image").SDImagePipeline


def package(name: str, folder: Path) -> None:
    """A package whose modules can be imported, and whose own code is not run."""
    module = ModuleType(name)
    module.__path__ = [str(folder)]
    module.__spec__ = ModuleSpec(name, None, is_package=True)
    sys.modules[name] = module


def stand_in(name: str, classes: tuple[str, ...]) -> None:
    """Empty classes in a module; the module too, where it is not there."""
    module = sys.modules.setdefault(name, ModuleType(name))
    for kind in classes:
        setattr(module, kind, type(kind, (), {}))


@contextmanager
def torchvision() -> Generator[None]:
    """A torchvision to import one name from, which only regional prompts use, where the real one is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    package("torchvision", Path())
    stand_in("torchvision.transforms", ("GaussianBlur",))
    try:
        yield
    finally:
        for name in ("torchvision", "torchvision.transforms"):
            del sys.modules[name]  # else others take it for the real one


def load_diffsynth(file: Path) -> Any:  # noqa: ANN401
    """Its pipeline with its networks, filled from the file by its own tables."""
    from safetensors.torch import load_file

    kind = diffsynth_pipeline()
    pipeline: Any = kind(device="cpu", torch_dtype=torch.float32)
    models: Any = sys.modules["diffsynth.models"]
    weights = load_file(file)
    for name, network in (
        ("text_encoder", models.SDTextEncoder),
        ("unet", models.SDUNet),
        ("vae_decoder", models.SDVAEDecoder),
    ):
        with torch.device("meta"):
            made = network()
        made.load_state_dict(network.state_dict_converter().from_civitai(weights), assign=True)
        if name == "text_encoder":
            made.attn_mask = made.attention_mask(77)  # no buffer: meta left it empty
        setattr(pipeline, name, made.requires_grad_(False).eval())
    pipeline.prompter.fetch_models(pipeline.text_encoder)
    return pipeline


def difference(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Relative to their largest value, and to their root mean square."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    gap = (ours - theirs).double()
    return {
        "largest, of the largest": float(gap.abs().max() / theirs.abs().max()),
        "rms, of the rms": float(gap.square().mean().sqrt() / theirs.double().square().mean().sqrt()),
    }


def tap(owner: Any, name: str, kept: list[Tensor]) -> None:  # noqa: ANN401
    """Keep what a function of the owner gives."""
    function = getattr(owner, name)

    def run(*positional: Any, **named: Any) -> Tensor:
        kept.append(function(*positional, **named))
        return kept[-1]

    vars(owner)[name] = run
    getattr(owner, "_modules", {}).pop(name, None)


@torch.inference_mode()
def compare(model: Sd1Model, pipeline: Any, side: int, steps: int) -> dict[str, Any]:
    request = calotype.Request(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=side,
        height=side,
        steps=steps,
        cfg_scale=CFG,
        seed=SEED,
        sampler="ddim",
        schedule="linspace",
    )
    job = request.complete(model.defaults, seed=SEED)
    result: dict[str, Any] = {}

    mine = torch.cat([model.condition(words, job, negative=False).texts[0] for words in (PROMPT, NEGATIVE)])
    text = torch.cat([pipeline.encode_prompt(words)["encoder_hidden_states"] for words in (PROMPT, NEGATIVE)])
    result["CLIP, both prompts"] = difference(mine, text)

    levels = model.levels(job)
    pipeline.scheduler.set_timesteps(steps)
    times = pipeline.scheduler.timesteps.tolist()
    result["times"] = {"calotype": [level.time for level in levels.path[:-1]], "diffsynth": times}
    x = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED))
    time_ = torch.tensor(times[len(times) // 2 :][:1])
    prepared = model.unet.prepare([text], None, time_)
    ours = model.unet(x, *prepared.at(0))
    theirs = torch.cat([pipeline.unet(x, time_, row[None]) for row in text])
    result["UNet, both prompts on the same text"] = difference(ours, theirs)

    latent = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(SEED + 1)) * 0.8
    result["decoder"] = difference(model.decode(latent) * 2 - 1, pipeline.vae_decoder(latent))

    decoded: list[Tensor] = []
    tap(model, "decode", decoded)
    tap(pipeline, "vae_decoder", decoded)
    seconds: dict[str, float] = {}
    start = time.perf_counter()
    drawn = calotype.Model(model).generate(request)
    seconds["calotype"] = round(time.perf_counter() - start, 2)
    start = time.perf_counter()
    reference = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        cfg_scale=CFG,
        height=side,
        width=side,
        num_inference_steps=steps,
        seed=SEED,
        progress_bar_cmd=list,
    )
    seconds["diffsynth"] = round(time.perf_counter() - start, 2)
    a, b = np.asarray(drawn, dtype=int), np.asarray(reference, dtype=int)
    shares = {str(level): float((a - b == level).mean()) for level in sorted(set((a - b).ravel().tolist()))}
    mine, theirs = (decoded[0][0] * 255).clip(0, 255), ((decoded[1][0] / 2 + 0.5) * 255).clip(0, 255)
    result["picture"] = {
        "largest difference before rounding, of 255": float((mine - theirs).abs().max()),
        "root mean square difference before rounding, of 255": float((mine - theirs).square().mean().sqrt()),
        "largest difference of 255": int(abs(a - b).max()),
        "share of values at each difference (Calotype rounds, DiffSynth cuts off)": shares,
        "spread of DiffSynth's values, of 255": float(b.std()),
        "seconds, both once and in one process": seconds,
    }
    return result


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--folder", type=Path, required=True, help="where the model is kept between runs")
    arguments.add_argument("--side", type=int, default=512)
    arguments.add_argument("--steps", type=int, default=3)
    arguments.add_argument("--save", action="store_true", help="keep the result under benchmarks/results")
    given = arguments.parse_args()
    folder = given.folder / "sd1-float32"
    file = sd1(folder, torch.float32)
    pipeline = load_diffsynth(file)
    model = calotype.load(file, folder / "tokenizer", device="cpu", dtype="float32").family
    assert isinstance(model, Sd1Model)
    result = {
        "command": command("against_diffsynth.py", sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("torch", "diffsynth", "transformers"),
        "commit": commit(),
        "model": f"Stable Diffusion 1.5, {given.side}x{given.side}, float32, random weights, {given.steps} DDIM steps, "
        f"cfg {CFG}",
    } | compare(model, pipeline, given.side, given.steps)
    import json

    print(json.dumps(result, indent=1))
    if given.save:
        print(f"kept in {keep('sd1-diffsynth-parity.json', result)}")


if __name__ == "__main__":
    main()

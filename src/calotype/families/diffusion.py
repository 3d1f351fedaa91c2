"""How variance-preserving models space their levels: a scheduler_config.json, or a family's own numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import numpy as np

from calotype.checkpoint.layouts import Settings
from calotype.errors import DamagedFile, UnsupportedModel
from calotype.families.family import Clues
from calotype.sampling.levels import (
    BETAS,
    VP_SCHEDULES,
    Levels,
    VariancePreserving,
    VPSchedule,
    at_ratios,
    at_times,
    karras,
    leading,
    linspace,
    trailing,
    vp_normal,
)


@dataclass(frozen=True, kw_only=True)
class DiffusionSettings:
    """A checkpoint's process, what its network predicts, and how it is sampled unless a request says otherwise.

    `own` holds schedules that mean something else here than elsewhere; `unit_start` begins with noise of spread 1
    instead of the first level's sigma; `ends_clean` is False where the last step leads to the first training step.
    """

    process: VariancePreserving
    prediction: Literal["noise", "v"]
    sampler: str
    schedule: str
    own: Mapping[str, VPSchedule] = field(default_factory=dict[str, VPSchedule])
    unit_start: bool = False
    ends_clean: bool = True

    def levels(self, schedule: str, steps: int, start: float) -> Levels:
        """The levels of a schedule by name."""
        levels = self.own.get(schedule, VP_SCHEDULES[schedule])(self.process, steps, start)
        return levels if self.ends_clean else levels.ending(self.process.at_time(0))


def scaled_linear(*, last: float, steps: int = 1000, zero_snr: bool = False) -> VariancePreserving:
    """Stable Diffusion's process: betas whose roots are even from sqrt(0.00085) to sqrt(last)."""
    return VariancePreserving.from_betas(BETAS["scaled_linear"](0.00085, last, steps), zero_snr)


def diffusion_of(family: DiffusionSettings, zero_snr: VariancePreserving, clues: Clues) -> DiffusionSettings:
    """A checkpoint's settings: its folder's scheduler_config.json, else the family's under what its file says of itself
    by empty tensors: `v_pred`, and `ztsnr` for a process that ends in pure noise (`zero_snr`).
    """
    if clues.scheduler is not None:
        return from_scheduler(clues.scheduler)
    if "v_pred" in clues.markers:
        family = replace(family, prediction="v")
    if "ztsnr" in clues.markers:
        # Schedules that lean on the largest ratio have none to lean on.
        family = replace(family, process=zero_snr, sampler="euler", schedule="trailing")
    return family


def suffix(diffusion: DiffusionSettings) -> str:
    """What a variant's name says of a process other than the family's: -v, -v-zsnr."""
    pure_noise = diffusion.process.alpha_bars[-1] < 1e-6
    return ("-v" if diffusion.prediction == "v" else "") + ("-zsnr" if pure_noise else "")


def scheduler_config(variant: str, *, last: float = 0.012, steps: int = 1000) -> dict[str, Any]:
    """scheduler_config.json of a variant, for conversion: how its family samples single files, in diffusers' words."""
    trailing = variant.endswith("-zsnr") or variant == "turbo"
    sampler = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver++", "use_karras_sigmas": True}
    return {
        **({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"} if trailing else sampler),
        "beta_end": last,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "num_train_timesteps": steps,
        "prediction_type": "v_prediction" if "-v" in variant else "epsilon",
        "rescale_betas_zero_snr": variant.endswith("-zsnr"),
    }


# What the latent diffusion repository's class registers beside its networks: the process, in tables of 1000 numbers.
TABLES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
AVERAGING = ("model_ema.decay", "model_ema.num_updates")  # how the moving averages are kept
# Outside all parts, and of no use for drawing; v_pred and ztsnr have been read by then.
TRAINING = (*TABLES, "lvlb_weights", "logvar", "scale_factor", "model_ema.*", "*.position_ids", "*loss.*")
MARKERS = ("v_pred", "ztsnr")

REFUSED_MARKERS = {
    "edm_mean": "the EDM process of Playground v2.5",
    "edm_vpred.sigma_max": "the EDM process of CosXL",
}

# What each of diffusers' classes does where its file is silent.
_CLASSES: dict[str, dict[str, Any]] = {
    "DDIMScheduler": {"spacing": "leading", "sampler": "ddim", "set_alpha_to_one": True, "clip_sample": True},
    "DDPMScheduler": {"spacing": "leading", "sampler": "euler_ancestral", "clip_sample": True},
    "PNDMScheduler": {"spacing": "leading", "sampler": "plms", "set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": {"spacing": "linspace", "sampler": "euler"},
    "EulerAncestralDiscreteScheduler": {"spacing": "linspace", "sampler": "euler_ancestral"},
    "HeunDiscreteScheduler": {"spacing": "linspace", "sampler": "heun"},
    "DPMSolverMultistepScheduler": {"spacing": "linspace", "sampler": "dpmpp_2m"},
    "UniPCMultistepScheduler": {"spacing": "linspace", "sampler": "unipc"},
}
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler")
_MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")


def from_scheduler(config: Settings) -> DiffusionSettings:
    """What a diffusers scheduler_config.json asks for, so that the same seed gives diffusers' own picture.

    Raises UnsupportedModel for what is not done here, DamagedFile for values that make no sense.
    """
    name = str(config.get("_class_name"))
    if name not in _CLASSES:
        raise _refusal("_class_name", name, f"known: {', '.join(_CLASSES)}")
    config = {**_CLASSES[name], **config}
    for key in ("thresholding", "clip_sample", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas"):
        if config.get(key):
            raise _refusal(key, config[key], "known: false")
    _check(
        config,
        {
            "interpolation_type": ("linear", "log_linear"),
            "timestep_type": ("discrete",),
            "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
            "solver_order": (2,),
            "solver_type": ("midpoint", "bh2"),
            "skip_prk_steps": (True,),
            "lower_order_final": (True,),
            "use_flow_sigmas": (False,),
            "predict_x0": (True,),
            "variance_type": (None, "fixed_small", "fixed_small_log"),
            "final_sigmas_type": ("zero", "sigma_min"),
        },
    )
    predictions: dict[str, Literal["noise", "v"]] = {"epsilon": "noise", "v_prediction": "v"}
    prediction = str(config.get("prediction_type", "epsilon"))
    if prediction not in predictions:
        raise _refusal("prediction_type", prediction, f"known: {', '.join(predictions)}")
    try:
        process = _process(config)
        offset = int(config.get("steps_offset", 0))
    except (TypeError, ValueError) as error:
        raise DamagedFile(f"scheduler_config.json: {error}") from error
    spacing = str(config.get("timestep_spacing", config["spacing"]))
    sampler = str(config["sampler"])
    if config.get("algorithm_type") == "sde-dpmsolver++" and sampler == "dpmpp_2m":
        sampler = "dpmpp_2m_sde"
    schedule, function = _schedule(name, spacing, offset, bool(config.get("use_karras_sigmas", False)))
    if name == "DDIMScheduler":
        function = partial(_counted_back, base=function)
    last_clean = config.get("set_alpha_to_one", True) and config.get("final_sigmas_type", "zero") == "zero"
    return DiffusionSettings(
        process=process,
        prediction=predictions[prediction],
        sampler=sampler,
        schedule=schedule,
        own={schedule: function},
        unit_start=name not in _EULER or spacing == "leading",
        ends_clean=bool(last_clean),
    )


def _process(config: Settings) -> VariancePreserving:
    zero_snr = bool(config.get("rescale_betas_zero_snr", False))
    betas = config.get("trained_betas")
    if betas is None:
        form = str(config.get("beta_schedule", "linear"))
        if form not in BETAS:
            raise _refusal("beta_schedule", form, f"known: {', '.join(BETAS)}")
        ends = float(config.get("beta_start", 0.0001)), float(config.get("beta_end", 0.02))
        betas = BETAS[form](*ends, int(config.get("num_train_timesteps", 1000)))
    process = VariancePreserving.from_betas(np.asarray(betas, dtype=np.float64), zero_snr)
    if zero_snr and config["_class_name"] in (*_EULER, *_MULTISTEP):
        process = VariancePreserving((*process.alpha_bars[:-1], 2**-24))  # nearly pure noise: they divide by alpha
    return process


def _schedule(name: str, spacing: str, offset: int, with_karras: bool) -> tuple[str, VPSchedule]:
    """The name that the file's spacing has here, and what it does."""
    multistep = name in _MULTISTEP
    spacings: dict[str, VPSchedule] = {
        "leading": _leading_inner if multistep else partial(leading, offset=offset),
        "trailing": trailing,
        "linspace": _linspace_inner if multistep else vp_normal if name in _EULER else linspace,
    }
    if multistep:
        spacings["leading"] = partial(_leading_inner, offset=offset)
    if spacing not in spacings:
        raise _refusal("timestep_spacing", spacing, f"known: {', '.join(spacings)}")
    if not with_karras:
        return spacing, spacings[spacing]
    if multistep:
        return "karras", _karras_told_whole_steps
    return "karras", partial(_karras_between, base=spacings[spacing])


def _leading_inner(process: VariancePreserving, steps: int, start: float = 1.0, offset: int = 0) -> Levels:
    """Multistep solvers in diffusers: `leading` of a step more, without its cleanest."""
    reach = round(process.train_steps * start)
    ratio = max(reach // (steps + 1), 1)
    return at_times(process, [offset + i * ratio for i in range(steps, 0, -1)])


def _linspace_inner(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """Multistep solvers in diffusers: even whole times of a step more, without the cleanest."""
    last = max(round(process.train_steps * start), 2) - 1
    return at_times(process, [float(time) for time in np.linspace(0, last, steps + 1).round()[:0:-1]])


def _counted_back(process: VariancePreserving, steps: int, start: float = 1.0, *, base: VPSchedule) -> Levels:
    """DDIM in diffusers: a step leads T // n training steps back, also where the spacing's next level is not there."""
    levels = base(process, steps, start)
    back = process.train_steps // steps
    times = [int(level.time) - back for level in levels.path[:-1]]
    reached = tuple(process.at_time(time) if time >= 0 else levels.path[-1] for time in times)
    return levels if start < 1 else replace(levels, reached=reached)


def _karras_told_whole_steps(process: VariancePreserving, steps: int, start: float = 1.0) -> Levels:
    """Multistep solvers in diffusers: `karras`, but the network is told the nearest whole training step."""
    levels = karras(process, steps, start)
    path = tuple(level._replace(time=float(round(level.time))) for level in levels.path)
    return replace(levels, path=path)


def _karras_between(process: VariancePreserving, steps: int, start: float = 1.0, *, base: VPSchedule) -> Levels:
    """Euler's solvers in diffusers: even in ratio^(1/7) between the ends of the spacing that it replaces."""
    ends = base(process, steps, start).path
    most, least = ends[0].ratio, ends[-2].ratio
    roots: list[float] = np.linspace(most ** (1 / 7), least ** (1 / 7), steps).tolist()
    return at_ratios(process, [root**7 for root in roots])


def _check(config: Settings, allowed: Mapping[str, tuple[object, ...]]) -> None:
    for key, values in allowed.items():
        if key in config and config[key] not in values:
            raise _refusal(key, config[key], f"known: {', '.join(map(str, values))}")


def _refusal(key: str, value: object, what: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"scheduler_config.json: {key} = {value!r} is not supported ({what}); remove the file to sample as the family "
        "does, and ask for a sampler and a schedule by name"
    )

"""How flow models space their levels: a scheduler_config.json, or a family's own numbers."""

from __future__ import annotations

from dataclasses import dataclass

from calotype.checkpoint.layouts import Settings
from calotype.errors import DamagedFile, UnsupportedModel
from calotype.sampling.levels import dynamic_shift


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """How a checkpoint spaces its levels, as a diffusers `scheduler_config.json` states it.

    With `dynamic`, the shift is exp(mu), mu linear in the number of image tokens between the two given points;
    otherwise it is `shift`, 1 meaning none.
    """

    shift: float
    dynamic: bool
    base_shift: float
    max_shift: float
    base_tokens: int
    max_tokens: int

    def shift_for(self, tokens: int) -> float:
        """The shift for a picture of so many image tokens."""
        if not self.dynamic:
            return self.shift
        return dynamic_shift(tokens, (self.base_tokens, self.base_shift), (self.max_tokens, self.max_shift))


# What the scheduler may say beside its shift: the one value that runs here, which null leaves too.
WANTED = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "shift_terminal": None,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def flow_settings(config: Settings, title: str) -> FlowSettings:
    """What a scheduler_config.json asks for; UnsupportedModel where it is not what runs here.

    `title` names the family in messages.
    """
    for name, value in WANTED.items():
        if config.get(name, value) not in (value, None):
            raise UnsupportedModel(
                f"scheduler_config.json: {name} = {config[name]!r} is not supported; remove the file to sample as "
                f"{title} does, and ask for a sampler and a schedule by name"
            )
    try:
        return FlowSettings(
            shift=float(config.get("shift", 1.0)),
            dynamic=bool(config.get("use_dynamic_shifting", False)),
            base_shift=float(config.get("base_shift", 0.5)),
            max_shift=float(config.get("max_shift", 1.15)),
            base_tokens=int(config.get("base_image_seq_len", 256)),
            max_tokens=int(config.get("max_image_seq_len", 4096)),
        )
    except (TypeError, ValueError) as error:
        raise DamagedFile(f"scheduler_config.json: {error}") from error

"""Sampling: noise levels and schedules, samplers, guidance. It touches neither files nor devices."""

from calotype.sampling.guidance import Prediction, guided, guided_pair
from calotype.sampling.levels import (
    BETAS,
    FLOW_SCHEDULES,
    VP_SCHEDULES,
    Flow,
    FlowSchedule,
    Level,
    Levels,
    Process,
    VariancePreserving,
    VPSchedule,
    dynamic_shift,
)
from calotype.sampling.samplers import SAMPLERS, Denoise, Noise, Sampler, Step, evaluated

__all__ = [
    "BETAS",
    "FLOW_SCHEDULES",
    "SAMPLERS",
    "VP_SCHEDULES",
    "Denoise",
    "Flow",
    "FlowSchedule",
    "Level",
    "Levels",
    "Noise",
    "Prediction",
    "Process",
    "Sampler",
    "Step",
    "VPSchedule",
    "VariancePreserving",
    "dynamic_shift",
    "evaluated",
    "guided",
    "guided_pair",
]

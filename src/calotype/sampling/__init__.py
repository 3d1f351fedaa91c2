"""Sampling: noise levels and schedules, samplers, guidance. It touches neither files nor devices."""

from calotype.sampling.guidance import Both, Prediction, guided, guided_both
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
    "Both",
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
    "guided_both",
]

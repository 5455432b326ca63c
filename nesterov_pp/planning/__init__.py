"""Estimates of the time, memory and delays of a pipeline on other machines, before it runs there."""

from nesterov_pp.planning.layers import LayerCost, StageCost, measure_layers, stage_costs
from nesterov_pp.planning.memory import memory_per_stage
from nesterov_pp.planning.simulate import SCHEDULES, Network, Simulated, simulate

__all__ = [
    "SCHEDULES",
    "LayerCost",
    "Network",
    "Simulated",
    "StageCost",
    "measure_layers",
    "memory_per_stage",
    "simulate",
    "stage_costs",
]

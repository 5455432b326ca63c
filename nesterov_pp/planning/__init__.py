"""Estimates of the time, memory and delays of a pipeline on other machines, before it runs there."""

from nesterov_pp.planning.layers import LayerCost, StageCost, measure_layers, stage_costs
from nesterov_pp.planning.memory import memory_per_stage
from nesterov_pp.planning.simulate import SCHEDULES, Network, Simulated, least_slack, simulate

__all__ = [
    "SCHEDULES",
    "LayerCost",
    "Network",
    "Simulated",
    "StageCost",
    "least_slack",
    "measure_layers",
    "memory_per_stage",
    "simulate",
    "stage_costs",
]

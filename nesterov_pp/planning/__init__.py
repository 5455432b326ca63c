"""What a pipeline would do on other machines: its time, its memory and its delays, before money is spent."""

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

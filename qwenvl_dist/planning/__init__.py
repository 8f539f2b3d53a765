"""What a run will take, from config.json and the data's manifest alone. Imports no torch.

plan(recipe, gpus, nodes, gpu_memory_gib) -> Plan: memory of each choice, checkpoint bytes and files, steps, arithmetic.
"""

from qwenvl_dist.planning.estimate import Choice, Plan, advice, plan

__all__ = ["Choice", "Plan", "advice", "plan"]

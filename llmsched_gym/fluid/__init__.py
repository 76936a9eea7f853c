"""The fluid capacity: a rate of arrivals that no scheduler sustains more than, as a small linear program.

Derivation, assumptions and what the bound leaves out: docs/theory.md.
"""

from llmsched_gym.fluid.capacity import exclusive_capacity, exclusive_factor, fluid_capacity
from llmsched_gym.fluid.cluster import ClusterFluid, cluster_fluid
from llmsched_gym.fluid.solution import Fluid
from llmsched_gym.fluid.work import Work, mean_work

__all__ = [
    "ClusterFluid",
    "Fluid",
    "Work",
    "cluster_fluid",
    "exclusive_capacity",
    "exclusive_factor",
    "fluid_capacity",
    "mean_work",
]

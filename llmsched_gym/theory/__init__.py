"""What no scheduler can beat, and what each of them sustains: the fluid bound and a statistical stability test."""

from llmsched_gym.fluid import Fluid, Work, fluid_capacity, mean_work
from llmsched_gym.theory.stability import Boundary, Drift, boundary, drift

__all__ = ["Boundary", "Drift", "Fluid", "Work", "boundary", "drift", "fluid_capacity", "mean_work"]

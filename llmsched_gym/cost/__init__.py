"""Cost profiles: what a batch takes on a device. Shipped ones, rooflines, and fits to measurements."""

from llmsched_gym.cost.fit import fit as fit_profile
from llmsched_gym.cost.profile import (
    PROFILES,
    Profile,
    ProfileError,
    SmoothLinear,
    TableLinear,
    list_profiles,
    load_profile,
)
from llmsched_gym.cost.reach import check_reach
from llmsched_gym.cost.roofline import DEVICES, MODELS, roofline
from llmsched_gym.cost.variants import split_name

__all__ = [
    "DEVICES",
    "MODELS",
    "PROFILES",
    "Profile",
    "ProfileError",
    "SmoothLinear",
    "TableLinear",
    "check_reach",
    "fit_profile",
    "list_profiles",
    "load_profile",
    "roofline",
    "split_name",
]

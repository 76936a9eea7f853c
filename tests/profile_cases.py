"""A small profile, for tests of profiles."""

from llmsched_gym.cost import (
    DEVICES,
    MODELS,
    Profile,
    TableLinear,
)

RTX = "rtx6000ada-mistral-7b"


def tiny(**fields):
    """A profile with round numbers: a batch of n tokens takes 1 + 10 + n ms, before attention."""
    values = {
        "name": "tiny",
        "model": MODELS["mistral-7b"],
        "device": DEVICES["h100-sxm"],
        "tile_tokens": 4,
        "linear": TableLinear((1, 2, 12), (11.0, 12.0, 22.0)),
        "overhead_ms": 1.0,
        "pair_ms": 0.5,
        "kv_ms": 0.25,
        "num_kv_blocks": 10,
    }
    return Profile(**{**values, **fields})

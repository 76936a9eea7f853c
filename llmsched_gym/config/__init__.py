"""Frozen, validated descriptions of scenarios, environments and clusters; the named suites."""

from llmsched_gym.config.cluster import MOST_REPLICAS, ROLES, ClusterScenario, RouteConfig
from llmsched_gym.config.env import ACTIONS, MASK_NAMES, OBSERVATIONS, EnvConfig
from llmsched_gym.config.fields import MOST, OF_THE_VECTOR, ConfigError, UnknownField, check_names, plain, plain_fields
from llmsched_gym.config.machine import DeviceSpec, ModelSpec
from llmsched_gym.config.names import split_names
from llmsched_gym.config.scenario import (
    ADMISSIONS,
    BACKENDS,
    BLOCK_SIZE,
    MEASURED,
    SLO_CLASSES,
    TBT_RULES,
    Scenario,
    blocks_needed,
)
from llmsched_gym.config.suite import Suite, suite_text
from llmsched_gym.config.suites import CLUSTER_SUITES, SUITES, env_config, find_suite, route_config, scenario

__all__ = [
    "ACTIONS",
    "ADMISSIONS",
    "BACKENDS",
    "BLOCK_SIZE",
    "CLUSTER_SUITES",
    "MASK_NAMES",
    "MEASURED",
    "MOST",
    "MOST_REPLICAS",
    "OBSERVATIONS",
    "OF_THE_VECTOR",
    "ROLES",
    "SLO_CLASSES",
    "SUITES",
    "TBT_RULES",
    "ClusterScenario",
    "ConfigError",
    "DeviceSpec",
    "EnvConfig",
    "ModelSpec",
    "RouteConfig",
    "Scenario",
    "Suite",
    "UnknownField",
    "blocks_needed",
    "check_names",
    "env_config",
    "find_suite",
    "plain",
    "plain_fields",
    "route_config",
    "scenario",
    "split_names",
    "suite_text",
]

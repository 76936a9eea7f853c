"""llmsched-gym: a Gymnasium environment for scheduling LLM inference. Importing it registers the environments."""

from pathlib import Path

from gymnasium.envs.registration import register

from llmsched_gym.config import CLUSTER_SUITES, SUITES, ConfigError, EnvConfig, Scenario, env_config, scenario

_root = Path(__file__).resolve().parents[1]
if (_root / "pyproject.toml").is_file() and (_root / "baselines").is_dir():
    # A source tree: agents, baselines and real_backend lie beside this folder, installed they lie in it.
    __path__.append(str(_root))

__version__ = "0.1.0"
__all__ = ["SUITES", "ConfigError", "EnvConfig", "Scenario", "env_config", "scenario"]

for _name, _suite in SUITES.items():
    register(
        _suite.env_id,
        entry_point="llmsched_gym.env:LLMSchedEnv",
        vector_entry_point="llmsched_gym.env:LLMSchedVectorEnv",
        reward_threshold=_suite.reward_threshold,
        kwargs={"suite": _name},
    )

for _name, _suite in CLUSTER_SUITES.items():
    register(
        _suite.env_id,
        entry_point="llmsched_gym.env.route:LLMRouteEnv",
        vector_entry_point="llmsched_gym.env.route:LLMRouteVectorEnv",
        kwargs={"suite": _name},
    )

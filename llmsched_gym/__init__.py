"""llmsched-gym: a Gymnasium environment for scheduling LLM inference. Importing it registers the environments."""

from gymnasium.envs.registration import register

from llmsched_gym.config import SUITES, ConfigError, EnvConfig, Scenario, env_config, scenario

__version__ = "0.1.0"
__all__ = ["SUITES", "ConfigError", "EnvConfig", "Scenario", "env_config", "scenario"]

for _name, _suite in SUITES.items():
    register(
        _suite.env_id,
        entry_point="llmsched_gym.env:LLMSchedEnv",
        vector_entry_point="llmsched_gym.env:LLMSchedVectorEnv",
        kwargs={"suite": _name},
    )

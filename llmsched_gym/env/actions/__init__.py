"""What agents decide: a module for each kind of action, and the table through which all others know of it."""

from llmsched_gym.config import EnvConfig
from llmsched_gym.env.actions import knobs, preset, priority, request
from llmsched_gym.env.actions.action import Action, Choice, InvalidAction, as_array, check_range

ACTIONS: dict[str, Action] = {
    action.name: action for action in (knobs.ACTION, preset.ACTION, priority.ACTION, request.ACTION)
}
"""By their names in :data:`llmsched_gym.config.ACTIONS`."""


def action_of(config: EnvConfig) -> Action:
    """The kind of action of an environment."""
    return ACTIONS[config.action]


__all__ = ["ACTIONS", "Action", "Choice", "InvalidAction", "action_of", "as_array", "check_range"]

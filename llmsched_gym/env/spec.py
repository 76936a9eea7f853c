"""The spec that gymnasium keeps of an environment, in the form in which its JSON is read back."""

from __future__ import annotations

import copy
from typing import Any

from gymnasium.envs.registration import EnvSpec

from llmsched_gym.config import plain


class JsonSpec:
    """Keeps `spec` so that ``EnvSpec.from_json(env.spec.to_json()) == env.spec``: JSON knows no tuples, nor NumPy."""

    _spec: EnvSpec | None = None

    @property
    def spec(self) -> EnvSpec | None:
        """What gym.make made the environment from."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        self._spec = copy.copy(spec)
        if self._spec is not None:
            self._spec.kwargs = _as_json(self._spec.kwargs)


def _as_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _as_json(v) for key, v in value.items()}
    value = plain(value)
    return [_as_json(v) for v in value] if isinstance(value, tuple) else value

"""Lists of names as options have them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from llmsched_gym.config.fields import ConfigError


def split_names(texts: Sequence[str], what: str = "policy") -> list[str]:
    """Names separated by commas, those inside brackets left alone; ConfigError, as of `what`, where one is empty."""
    names = [name.strip() for text in texts for name in re.split(r",(?![^\[\]]*\])", text)]
    if not all(names):
        raise ConfigError(f"{what}: expected names separated by commas, got {','.join(texts)!r}")
    return names

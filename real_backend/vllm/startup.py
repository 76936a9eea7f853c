"""What vLLM runs when it starts (entry point ``vllm.general_plugins``): a server that cannot be is refused in one line.

The scheduler itself is made in the engine's process, where an error would be one line among vLLM's tracebacks.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Sequence
from typing import Any

PLUGIN = "llmsched_gym.real_backend.vllm"


def check_command() -> None:
    """End the process, status 2, if its command line asks for the plug-in with settings that cannot be used.

    vLLM calls this in every process that it starts; engines and workers leave the looking to the first.
    """
    if not any(PLUGIN in argument for argument in sys.argv):
        return
    from llmsched_gym.real_backend.vllm.versions import check_version, let_vllm_look_at_llvmlite

    let_vllm_look_at_llvmlite()
    if multiprocessing.parent_process() is not None:
        return
    from llmsched_gym.config import ConfigError
    from llmsched_gym.cost import ProfileError, load_profile
    from llmsched_gym.real_backend.errors import BackendError
    from llmsched_gym.real_backend.vllm.options import read_options
    from llmsched_gym.registry import make_scheduler
    from llmsched_gym.scheduler import PolicyError

    try:
        version = getattr(sys.modules.get("vllm"), "__version__", None)
        if version is not None:
            check_version(str(version))
        options = read_options(additional_config(sys.argv), os.environ)
        make_scheduler(options.policy)
        if options.profile is not None:
            load_profile(options.profile)
    except (BackendError, ConfigError, PolicyError, ProfileError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def additional_config(argv: Sequence[str]) -> Any:
    """What ``--additional-config`` says on a command line; {} if nothing, or no JSON, which vLLM will refuse."""
    for i, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == "--additional-config":
            text = value if equals else argv[i + 1] if i + 1 < len(argv) else ""
            try:
                return json.loads(text)
            except ValueError:
                return {}
    return {}

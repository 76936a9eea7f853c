"""SLAI (Bari, Hegde, de Veciana, arXiv 2508.01002): decodes wait until close to their deadline, prompts go first.

After each batch a decode gets its last schedulable time, LST = emission + TBT SLO - offset * mean batch time. A decode
is critical from then on; critical decodes go before prompts, the others get what prompts leave of the token budget.
"""

from llmsched_gym.engine.pack import CLASS, FCFS, SPF
from llmsched_gym.engine.step import LATEST_LST
from llmsched_gym.scheduler import Compiled

# Offset 5 below 96 % KV use and 10 from there on (the authors' "dynamic" offset), or 10 throughout ("fixed").
DYNAMIC = {"offset": 5.0, "offset_full": 10.0, "usage_switch": 0.96, "victim": LATEST_LST}
FIXED = {"offset": 10.0, "victim": LATEST_LST}

SCHEDULERS = {
    "slai": Compiled(
        "SLAI: deadline-deferred decodes, shortest prompt first, dynamic offset (arXiv 2508.01002)",
        settings={"order": SPF, **DYNAMIC},
    ),
    "slai-spf-fixed": Compiled("SLAI, shortest prompt first, offset fixed at 10", settings={"order": SPF, **FIXED}),
    "slai-fcfs-fixed": Compiled("SLAI, first come first served, offset fixed at 10", settings={"order": FCFS, **FIXED}),
    "slai-priority": Compiled(
        "SLAI, strict users' prompts first, then the shortest, dynamic offset", settings={"order": CLASS, **DYNAMIC}
    ),
}

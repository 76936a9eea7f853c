"""docs/environment.md, made from the environment itself: `python -m llmsched_gym.env.docs > docs/environment.md`."""

from __future__ import annotations

import inspect
import math

from llmsched_gym.config import env_config
from llmsched_gym.env import reward
from llmsched_gym.env.docs_parts import (
    WORKED,
    WORKED_SEED,
    action_sections,
    actions,
    example,
    fields,
    infos,
    mask_names,
    observation_sections,
    specification,
    suites,
    worked_steps,
)


def page() -> str:
    """The whole page."""
    derivation = inspect.cleandoc(reward.__doc__ or "").split("\n\n", 1)[1]
    usual = env_config()
    settings = ", ".join(f"{k}={v!r}" for k, v in WORKED.items())
    half_s = -usual.tau_s * math.log(0.5)
    return f"""# The environment

*This page is made by `python -m llmsched_gym.env.docs > docs/environment.md`.*

{specification()}

## Registered environments

{suites()}

`reward_threshold` is what `slai` earns in an episode, a mean over 20 selection seeds.
`python -m benchmarks.thresholds` has `on-time` beside it: a fifth more on `LLMSched-v0`, twice as much on the two with
sessions.

Any field of the [settings](#settings) can be given to `gym.make`, for every id. A wrong one raises a `ConfigError` of
one line that names it. `suite=` takes a TOML file, too ([formats.md](formats.md#suites)).

## Actions

{actions()}

Actions are checked. Integer spaces take integers of any width, lists too; `priority` takes numbers within -1 and 1. All
else (another shape, halves, an index without a value, nan) raises `InvalidAction`, a ValueError of one line that names
the entry, its range and the value, and in a vector environment which environment. The step has not happened then.

{action_sections()}

## Observation

"Log scale to S in steps of D" stands for min(1, log(1 + x / D) / log(1 + S / D)), without steps for D = 1; "share of S"
for min(1, x / S). Everything is bounded, so that no running statistics are needed.

{observation_sections()}

### Masks in observations

`action_masks()` is where sb3-contrib looks. Other libraries look into the observation: with `mask_in_observation=` it
is a Dict of the observation and the mask of legal actions,

{mask_names()}

for RLlib's `ActionMaskingRLModule` (of its examples, ray 2.60), TorchRL's `ActionMask` transform (0.14), Tianshou's
`DiscreteQLearningPolicy` (2.0), or whatever looks under two names of your own. First and last observations of an
episode have it too, in vector environments, from `set_state` and where the agent is evaluated as a scheduler. The mask
of knobs, all true, is those of all entries one behind the other: what RLlib's and TorchRL's distributions take, and
Tianshou has no use for. Priorities have none. What has no use is a `ConfigError`, as it is in the environments for
Stable-Baselines3. TorchRL 0.14 cannot read the last observations of a vector environment, gymnasium's own included,
where observations are a Dict: give it single ones.

## Reward

{derivation}

Let U_i be 0 until request i arrives, and t_0 < t_1 < ... < t_n the times at which steps end. Step k pays

    r_k = reward_scale * sum_i [ U_i(t_k) - U_i(t_(k-1)) ]

over the measured requests i. Summed over the episode everything between the first and the last time cancels:

    r_1 + ... + r_n = reward_scale * sum_i [ U_i(t_n) - U_i(t_0) ] = reward_scale * sum_i U_i(t_n)

which neither the length of the steps nor `action_repeat` changes. From the moment request i is resolved U_i stands
still, at

| end of the request | U_i |
| --- | --- |
| finished | 1 if it attained, else 0, minus beta * min(1, L_i / patience) |
| client left | -beta |
| refused | -beta |
| rejected on arrival, as it can never fit: no decision could have saved it | 0 |

and the return over a resolved cohort is `reward_scale` times the sum of these, to rounding. With `beta=0` it is the
number of requests that attained: divided by the number that arrived, the SLO attainment. Without patience
(`patience_s=inf`) lateness costs nothing. With `credit="finish"` the sum is the same and each U_i is paid when its
request is resolved. `tbt_rule` says which tokens count as late: any gap over the TBT SLO (`every-gap`), more than a
share 1 - X of the gaps (`fraction:X`), token k after TTFT SLO + k * TBT SLO (`deadline`), or gaps whose mean is over
the TBT SLO (`mean`: what vLLM's `--goodput tpot:` and MLPerf mean).

`info` has the parts, before `reward_scale`, as `reward_on_time` (+1 each), `reward_expired` (-1 each),
`reward_lateness`, `reward_refused`; `reward_terms()` has the last step's by their short names.

## Info

The same keys at every reset and step, all NumPy scalars; a vector environment has arrays of them, each with a mask
under its name with `_` in front.

{infos()}

Those that begin with `episode_` are there with `episode_metrics=True` (which records every gap between tokens: about
half a megabyte an environment) and nan until the episode ends. `episode_metrics()` has them at any time under their
names without `episode_`, without recorded gaps all but the last percentile. They are over the measured requests that
have arrived. An episode that a `TimeLimit` around the environment ends, which it does not know of, leaves them nan.

## Time

A step lasts as long as its batches. `info["duration_s"]` is how far the clock moved and `info["discount"]` is
exp(-duration / tau_s), to be used in place of a constant gamma: with tau_s = {usual.tau_s:g} s a reward counts half
after {half_s:.0f} s, however many batches went by. Decisions that take no time (adding a request to a batch) have
discount 1. An empty batch moves the clock to the next arrival, or by `idle_step_s` while work is pending, if that is
sooner.

## Episodes

- **Seed.** `reset(seed=s)` fixes the requests, their SLOs and the noise: those of `llmsched evaluate` for seed s. Every
  purpose has a random stream of its own, so that a seed has the same requests at every load. `info` has `seed` and
  `qps`, the true rate: for logs, not for agents.
- **Options.** `reset(options={{"qps": rate}})` fixes the mean arrival rate of the episode that begins, and of no later
  one: what a curriculum sets. Any other option raises a `ConfigError`; vector environments know `reset_mask`, too.
- **Reset without a seed** draws the next episode's seed from `np_random`, which the last `reset(seed=s)` has set.
- **Continuing** episodes (`num_requests=None`) start with up to `max_backlog` waiting requests and are truncated at
  `horizon_s`. They never terminate: bootstrap the value of the last observation.
- **Finite** episodes measure `num_requests` arrivals from `warmup_s` on and terminate when all of these are resolved.
  They are truncated `drain_s` after the last one's arrival. Requests outside the cohort take part and pay nothing.
- **After the end** a step raises `gymnasium.error.ResetNeeded`, as it does before the first reset.

## Vector environments

`gym.make_vec(id, num_envs=N)` steps all environments in compiled code; with `vectorization_mode="sync"` gymnasium would
loop over N single ones instead, which is several times slower.
Environment i of `reset(seed=s)` equals the single one with seed s + i, and the whole equals gymnasium's `SyncVectorEnv`
of single ones, step by step, in each `autoreset_mode`:

| `autoreset_mode=` | the step that ends an episode | the next step |
| --- | --- | --- |
| `"next_step"` (default) | returns its last observation | ignores that environment's action and returns the next \
episode's first observation: reward 0, duration 0, discount 1 |
| `"same_step"` | returns the next episode's first observation and info; the last ones are in `final_obs` and \
`final_info` | is the next episode's first |
| `"disabled"` | returns its last observation | raises, until `reset(options={{"reset_mask": mask}})`, bool of shape \
(N,), has reset it |

`"next_step"` is gymnasium's default and what RLlib and its wrappers expect. It costs one step an episode that is no
transition: leave it out of what you learn from, as `gymnasium.wrappers.vector` and RLlib do. A loop written for
`"same_step"` (CleanRL, TorchRL) must say so; in it `info` of a step that ends an episode is the next episode's, and its
own duration and discount are in `final_info`. The mode is in `metadata["autoreset_mode"]` and an attribute.
`reset_mask` is obeyed in every mode; `max_episode_steps`, `call`, `get_attr`, `set_attr` and `render` are gymnasium's.

**Stable-Baselines3.** `llmsched_gym.env.sb3.LLMSchedVecEnv(N)` is the same in mode `"same_step"`, with the last step's
info where an episode ends, `terminal_observation`, `TimeLimit.truncated` and `episode`, and with `action_masks` for
sb3-contrib. `agents.rollout.EpisodeMetrics` is a callback that logs the figures of episodes to TensorBoard.

## States, pickles and copies

`state = env.unwrapped.get_state()` is this moment of the episode, `env.unwrapped.set_state(state)` goes back to it and
returns the observation and the `info` of that moment. What follows then follows again, bit for bit, later episodes
included: the noise on batch times and the generator that seeds episodes are part of the state. A state is a value: it
stays as it is, can be set as often as one likes, pickled and copied.

- **Another future.** `set_state(state, seed=s)` draws the noise on the batches to come, and the seeds of later
  episodes, from `s`. The requests to come, and how long their answers get, are those of the episode: who tries actions
  from a state and keeps the best knows the future, as no scheduler may. Where nothing is noisy (`jitter=0` and no
  stragglers) `s` changes nothing in the episode.
- **Vector environments** have it by slot: `envs.get_state(i)`, `envs.set_state(j, state)`, of whichever slot or single
  environment of the same settings. So have the faces for Stable-Baselines3, with return and length of the episode.
  `max_episode_steps` goes on counting where the state was; a `TimeLimit` around a single environment does not know of
  it and counts on.
- **What it belongs to.** A state of other settings, another cost profile or another version of the code is refused
  by a `ConfigError` of one line, and nothing has changed then. The settings `reward` and `observation` count by their
  name, and what such an object of your own remembers is not part of the state; nor is the memory of a scheduler in
  Python that steps the environment (`SchedulerPolicy`). Those that form the batches of replicas are part of it.

`pickle`, `cloudpickle` and `copy.deepcopy` take environments themselves, single and vector ones, with gymnasium's
wrappers and those for Stable-Baselines3, in the middle of an episode; the copy goes on as the original. A reward
without a name (a lambda) needs cloudpickle, an open window is left behind, and an environment on a real backend raises
a `ConfigError`, as its state lies in a model's memory.

| environment | requests that have come | bytes of a state | get, us | set, us |
| --- | --- | --- | --- | --- |
| `LLMSched-v0` | 300 | 61,000 | 10 | 11 |
| with `episode_metrics=True` | 300 | 601,000 | 19 | 23 |
| `LLMSched-Chat-v0`, prefix caching | 300 | 1,590,000 | 43 | 46 |
| `LLMSched-Agents-v0`, prefix caching | 300 | 4,560,000 | 104 | 105 |
| `LLMRoute-v0` on `sharegpt` without prefix caching | 300 | 67,000 | 26 | 37 |
| `LLMRoute-v0`, prefix caching | 300 | 17,300,000 | 613 | 677 |

Medians of `python benchmarks/states.py` on one core; into a slot that another episode was in setting takes three times
as long. With prefix caching nearly all of it is the table of blocks, 4.2 MB for a replica of 28,491. All states of an
episode share its requests, which are not counted. `examples/planning.py` chooses schedulers by looking ahead:

{example("planning.py")}

## Three worked steps

`gym.make("LLMSched-v0", {settings})`, `reset(seed={WORKED_SEED})`; the token budget is raised from step to
step, all other knobs are 0. At time 0 there wait

{worked_steps()}

The third batch is the lesson: computing two prompts at once gave two first tokens in time and cost request 0 its SLO.

## Settings

{fields()}

## Your own reward, observation, scheduler

{example("custom_reward.py")}

{example("custom_observation.py")}

Each costs a call of Python for every environment and step. Marked as `batched` they take all environments at once,
arrays in and arrays out, at half of the built-in speed or better with 64 environments ([speed.md](speed.md)):

{example("custom_batched.py")}

{example("custom_scheduler.py")}

A scheduler runs in `llmsched evaluate --policy examples.custom_scheduler:ShortestFirst`.

## Schedulers as agents

`llmsched_gym.env.policy.SchedulerPolicy(env, "slai")` makes a scheduler, by name, as an object or as a policy folder,
an agent of a single environment. `policy.step()` steps the environment it was given, wrappers included (TimeLimit,
TransformReward, a collector of data), with the batches that `llmsched evaluate` would form; with `action_repeat=n`,
n of them. `policy.action()` is the action that does the same: a member of the action space for `env.step`, a log or a
student. Knobs have it for the settings of the packing kernel (`slai`, `sarathi`, constants), for `on-time` and for
`learned`; priorities and requests for policies with such actions; elsewhere a `ConfigError` says why not.
With knobs and priorities `env.step(policy.action())` is exactly `policy.step()`; a request action is one of those that
make up its batch. A copy of the action, as a data set keeps it, has the nearest
knobs: those of `slai` are exact, the cap and the limit that `on-time` plans are rounded, and it is held for
`action_repeat` batches.
"""


if __name__ == "__main__":
    print(page(), end="")

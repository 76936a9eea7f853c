"""EvoTorch: PGPE on a linear policy, on the native vector environment that resets in the step that ends an episode."""

import gymnasium as gym
import torch
from evotorch.algorithms import PGPE
from evotorch.neuroevolution import VecGymNE

from examples.libraries.common import ID, SEED, WORLD, Clock, decisions, utility

POPULATION, STEPS = 16, 100  # candidates of a generation, and decisions that each is judged by


def make_envs(num_envs, **config):
    """As many environments as candidates, on the same requests."""
    config |= {"vectorization_mode": "vector_entry_point", "autoreset_mode": "same_step", "max_episode_steps": STEPS}
    return gym.make_vec(ID, num_envs, **config, **WORLD)


problem = VecGymNE(make_envs, "Linear(obs_length, act_length)")
problem.manual_seed(SEED)
search = PGPE(problem, popsize=POPULATION, center_learning_rate=0.2, stdev_learning_rate=0.1, stdev_init=0.3)
count, clock = decisions(64_000), Clock()
search.run(max(1, count // (POPULATION * STEPS)))
policy = problem.to_policy(search.status["center"])
greedy = utility(lambda seen: int(policy(torch.as_tensor(seen)).argmax()))
clock.report("evotorch", "PGPE", int(problem.status["total_interaction_count"]), utility=greedy)

"""pycma: evolution of a linear policy, a candidate for each environment of a vector."""

import cma
import gymnasium as gym
import numpy as np

from examples.libraries.common import ID, NUM_ENVS, SEED, WORLD, Clock, decisions, utility

STEPS = 100  # decisions that a candidate is judged by, on the same requests as all others of its generation
count, clock, done = decisions(64_000), Clock(), 0
envs = gym.make_vec(ID, NUM_ENVS, vectorization_mode="vector_entry_point", **WORLD)
shape = (envs.single_observation_space.shape[0], int(envs.single_action_space.n))
search = cma.CMAEvolutionStrategy(
    np.zeros(shape[0] * shape[1]), 0.5, {"popsize": NUM_ENVS, "seed": SEED + 1, "CMA_diagonal": True, "verbose": -9}
)
while done < count:
    candidates = search.ask()
    weights = np.stack(candidates).reshape(-1, *shape)
    seen, _ = envs.reset(seed=[search.countiter + 1] * NUM_ENVS)
    returns, alive = np.zeros(NUM_ENVS), np.ones(NUM_ENVS)
    for _ in range(STEPS):
        seen, rewards, terminated, truncated, _ = envs.step(np.einsum("ef,efa->ea", seen, weights).argmax(1))
        returns += alive * rewards
        alive *= ~(terminated | truncated)
    search.tell(candidates, -returns)
    done += STEPS * NUM_ENVS
best = search.mean.reshape(shape)
clock.report("cma", "CMA-ES", done, utility=utility(lambda seen: np.argmax(seen @ best)))

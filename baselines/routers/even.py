"""Routers that do not look at what replicas do: in turn, and at random."""

from llmsched_gym.cluster.router import CompiledRouter, draw

NEXT = 0  # place in the memory


def round_robin(route):
    """In turn; who may not take the request is left out."""
    candidates, memory = route.candidates, route.memory
    n = candidates.shape[0]
    first = int(memory[NEXT])
    for i in range(n):
        j = (first + i) % n
        if candidates[j].is_legal:
            memory[NEXT] = (j + 1) % n
            return j
    return -1


def random(route):
    """Any of those that may take the request, all as likely."""
    candidates = route.candidates
    legal = 0
    for j in range(candidates.shape[0]):
        legal += candidates[j].is_legal
    if legal == 0:
        return -1
    left = draw(route, legal)
    for j in range(candidates.shape[0]):
        if candidates[j].is_legal:
            if left == 0:
                return j
            left -= 1
    return -1


ROUTERS = {
    "round-robin": CompiledRouter("in turn", round_robin),
    "random": CompiledRouter("any replica, all as likely", random),
}

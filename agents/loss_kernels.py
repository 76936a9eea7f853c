"""PPO's loss and its gradient in one pass over a minibatch, in compiled code.

An action has several entries, each drawn from a softmax of its own few scores. Written with torch that is two dozen
operations on rows of two to nine numbers, which take longer than the network's layers.
"""

from __future__ import annotations

import math

from llmsched_gym.engine.jit import entry, kernel

POLICY, VALUE, ENTROPY, KL, CLIPPED = range(5)
FIGURES = ("policy_gradient_loss", "value_loss", "entropy", "approx_kl", "clip_fraction")


@kernel()
def softmax(scores, mask, first, stop, shares):
    """Write the softmax of the legal scores first, ..., stop - 1 into `shares`; all are legal if the mask is empty.

    Returns the largest of the scores, the logarithm of the sum of exponentials beside it, and the entropy.
    """
    top, total, weighted = -math.inf, 0.0, 0.0
    for i in range(first, stop):
        if mask.shape[0] == 0 or mask[i]:
            top = max(top, scores[i])
    for i in range(first, stop):
        weight = math.exp(scores[i] - top) if mask.shape[0] == 0 or mask[i] else 0.0
        shares[i] = weight
        total += weight
        if weight > 0.0:
            weighted += weight * (scores[i] - top)
    for i in range(first, stop):
        shares[i] /= total
    return top, math.log(total), math.log(total) - weighted / total


@entry(nogil=True)
def loss_gradient(
    scores,
    values,
    masks,
    widths,
    rows,
    actions,
    old_log_probs,
    advantages,
    returns,
    size,
    weights,
    by_score,
    by_value,
    levels,
    sums,
):
    """The gradient of a minibatch's mean loss by what the networks say of some of its decisions, and sums over these.

    Args:
        scores: of the actor, (rows, number of scores) float32.
        values: of the critic, (rows,) float32.
        masks: legal scores of all decisions, (decisions, number of scores) bool; (decisions, 0) where all always are.
        widths: scores of each entry of an action, (entries,) int64.
        rows: which decisions these are, (rows,) int64.
        actions: of all decisions, (decisions, entries) int64.
        old_log_probs: of these, by the policy that acted, (decisions,) float32.
        advantages: of these, normalised, (rows,) float32.
        returns: what the critic is to tell, (decisions,) float32.
        size: of the minibatch.
        weights: clip range, weight of the entropy and of the critic's loss, (3,) float64.
        by_score: the loss's derivative by `scores`, to be written.
        by_value: and by `values`.
        levels: room for two numbers of each entry, (entries, 2) float64.
        sums: sums over these rows of what FIGURES names, (5,) float64, to be added to.
    """
    clip, entropy_weight, value_weight = weights[0], weights[1], weights[2]
    for row in range(rows.shape[0]):
        decision = rows[row]
        own, mask, shares = scores[row], masks[decision], by_score[row]
        log_prob, first = 0.0, 0
        for k in range(widths.shape[0]):
            stop, chosen = first + widths[k], first + actions[decision, k]
            top, log_total, entropy = softmax(own, mask, first, stop, shares)
            log_prob += own[chosen] - top - log_total
            levels[k, 0], levels[k, 1] = top + log_total, entropy
            sums[ENTROPY] += entropy
            first = stop
        change = log_prob - old_log_probs[decision]
        ratio, advantage = math.exp(change), advantages[row]
        clipped = min(max(ratio, 1.0 - clip), 1.0 + clip)
        by_log_prob = -advantage * ratio / size if advantage * ratio <= advantage * clipped else 0.0
        sums[POLICY] -= min(advantage * ratio, advantage * clipped)
        sums[KL] += ratio - 1.0 - change
        sums[CLIPPED] += ratio != clipped
        first = 0
        for k in range(widths.shape[0]):  # shares become derivatives
            stop, chosen = first + widths[k], first + actions[decision, k]
            for i in range(first, stop):
                share = shares[i]
                if share > 0.0:  # its logarithm is the score less the level
                    shares[i] = share * (entropy_weight / size * (own[i] - levels[k, 0] + levels[k, 1]) - by_log_prob)
            shares[chosen] += by_log_prob
            first = stop
        miss = values[row] - returns[decision]
        by_value[row] = 2.0 * value_weight * miss / size
        sums[VALUE] += miss * miss

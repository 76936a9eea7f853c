"""A router of your own, in plain Python."""

from llmsched_gym.cluster import RouterView


class CheapestPrompt:
    """The replica that computes what is ahead and this prompt, without what it has cached, first."""

    def route(self, view: RouterView) -> int:
        seconds = (view.replicas.prompt_tokens_left + view.replicas.uncached_tokens) / view.replicas.tokens_per_s
        return min(view.legal.nonzero()[0], key=lambda j: seconds[j])

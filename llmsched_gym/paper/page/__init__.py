"""docs/results.md and its figures, from the data that `llmsched_gym.paper.reproduce` gathered."""

from llmsched_gym.paper.page.page import write_page

__all__ = ["write_page"]

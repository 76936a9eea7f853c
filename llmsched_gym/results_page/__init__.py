"""docs/results.md and its figures, from the data that `llmsched_gym.reproduce` gathered."""

from llmsched_gym.results_page.page import write_page

__all__ = ["write_page"]

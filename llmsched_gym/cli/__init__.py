"""The command line: `llmsched COMMAND`, thin over the packages that do the work.

Results go to stdout, progress and remarks to stderr. What cannot be done is said in one line, with exit code 2.
Modules are imported by the commands that need them, so that listing things is quick.
"""

from llmsched_gym.cli.entry import app, main, run

__all__ = ["app", "main", "run"]

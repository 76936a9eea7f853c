"""A learner of each library on the environment, in the fewest lines that are right: see docs/libraries.md."""

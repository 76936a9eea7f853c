"""What agents decide: a module for each kind of action."""

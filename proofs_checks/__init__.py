"""One file a theorem: every statement that verideq stands on, searched for a counterexample."""

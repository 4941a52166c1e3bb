"""What one run does: prep, train, evaluate, compare, promote. Never imports ``sweeps``."""

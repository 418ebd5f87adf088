"""Training: optimizer, interactive rounds, step, loop."""

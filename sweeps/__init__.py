"""Who runs the steps, how often, and how long: studies inside a budget of CPU-seconds."""

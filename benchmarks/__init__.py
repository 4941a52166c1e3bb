"""What the project costs, measured: commands, and the figures that they gave."""

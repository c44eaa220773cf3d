"""Input and output tables in all their formats."""

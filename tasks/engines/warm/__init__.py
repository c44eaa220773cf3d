"""The engine of a model that another process keeps loaded."""

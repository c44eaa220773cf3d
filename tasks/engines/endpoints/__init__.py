"""The engine of inference endpoints."""

"""Flows: composition of the tasks."""

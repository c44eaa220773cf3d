"""The warm worker: one process that runs flow runs in threads and keeps its models loaded."""

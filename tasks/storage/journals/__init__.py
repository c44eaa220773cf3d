"""The journal of a batch: segments, locks, rows."""

"""Tasks: one thin verb per Prefect task, over plain importable functions."""

"""The export store: recipes, child processes, manifests, room."""

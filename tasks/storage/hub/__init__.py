"""Snapshots from the Hub: verified, resumable, by commit, and offline where they are complete."""

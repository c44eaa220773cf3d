"""Engines: what runs a loaded model, one file per backend behind one small protocol."""

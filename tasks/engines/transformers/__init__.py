"""Engines on the models of Transformers, in torch, and of Optimum where they generate the same way."""

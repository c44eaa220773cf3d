"""Engines on OpenVINO GenAI: a continuous batch that all callers share."""

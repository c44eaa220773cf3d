"""Automations of a Prefect server, one in each YAML file beside this module, and the command that creates them.

`python -m prefect_huggingface.deployments.automations` creates what is not there and brings up to date what is.
"""

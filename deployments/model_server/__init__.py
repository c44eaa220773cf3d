"""A server that keeps models loaded and speaks OpenAI's protocol.

    python -m prefect_huggingface.deployments.model_server --block all

Its models are those of the engine registry of its process, so that the requests of all clients share their batches.
"""

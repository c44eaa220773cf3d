"""Deployments: what runs where and when. The files that put flows onto a Prefect server, and the model server."""

"""Deployments: what runs where and when. The warm worker, and the files that put flows onto a Prefect server."""

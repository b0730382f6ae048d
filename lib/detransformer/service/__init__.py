"""Serves a model on devices that come and go.

`session.Session` is the front: it queues and batches requests, keeps deadlines, and answers each request once, with the
workers of a cluster (`cluster.fleet`). `http` puts a session behind FastAPI.
"""

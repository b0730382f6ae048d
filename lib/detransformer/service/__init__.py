"""A model served by devices that come and go.

`session.Session` is the front: a queue, batches, deadlines, and each request answered once, over the workers of a
cluster (`cluster.fleet`). `http` puts a session behind FastAPI.
"""

"""The room of what lasts: a model served by devices that come and go.

`Session` is the front: a queue, batches, deadlines, and each request answered once. Under it torchrun's elastic agents,
one a device (`agent`), keep a worker each (`worker`) and start it anew, as many as there are, when one is lost or back.
`http` puts a session behind FastAPI, `chaos` breaks it on purpose and counts.
"""

from detransformer.service.session import Expired, QueueFull, Session, Unanswered

__all__ = ["Expired", "QueueFull", "Session", "Unanswered"]

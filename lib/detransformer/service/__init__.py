"""The room of what lasts: a model served by devices that come and go.

`Session` is the front: a queue, batches, deadlines, and each request answered once. Under it torchrun's elastic agents,
one a device (`entry`, `agent`), keep a worker each (`worker`) and start it anew, as many as there are, when one is lost
or back. `http` puts a session behind FastAPI, `chaos` breaks it on purpose and counts.
"""

__all__ = ["Expired", "QueueFull", "Session", "Unanswered"]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from detransformer.service import session  # not with the room: an agent starts its fork server before torch

    return getattr(session, name)

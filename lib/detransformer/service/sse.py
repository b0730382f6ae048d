"""Server-sent events: answers sent while they are made."""

import json
from collections.abc import AsyncIterator

from fastapi.responses import StreamingResponse

from detransformer.service.errors import as_problem, refusal


async def streamed(path: str, events: AsyncIterator[str], last: str | None = None) -> StreamingResponse:
    """A response of `events`, then `last`.

    Waits for the first event, so that a refusal sets the status; a later failure is an event itself.
    """
    first = await anext(events)

    async def lines() -> AsyncIterator[str]:
        yield f"data: {first}\n\n"
        try:
            async for event in events:
                yield f"data: {event}\n\n"
        except Exception as error:
            status, sentence, _ = refusal(path, error)
            yield f"data: {json.dumps(as_problem(path, status, sentence))}\n\n"
        else:
            if last:
                yield f"data: {last}\n\n"
        finally:
            await events.aclose()

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

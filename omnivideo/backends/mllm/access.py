"""Who may ask a language model server: whoever has its key. Both servers, ours and vLLM's, use it."""

import hmac

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

OPEN_PATHS = ("/health", "/ready")  # for probes


class MLLMKeyMiddleware:
    """Answers 401 to a request without the server's key in its Authorization header; probes need none."""

    def __init__(self, app: ASGIApp, key: str):
        self.app = app
        self.authorization = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self.authorization):
                refusal = JSONResponse({"error": {"message": "the key is missing or wrong"}}, 401)
                await refusal(scope, receive, send)
                return
        await self.app(scope, receive, send)

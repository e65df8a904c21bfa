"""The links that leave the service: their address, and the signatures with which a browser loads media without a key.

A signature is valid for one path, one owner and GET, until the time in the link. Its key is derived from the admin
key, so all processes of a service accept each other's links, and a new admin key ends all of them.
"""

import hashlib
import hmac
import time
from dataclasses import dataclass
from typing import Annotated
from urllib.parse import urlencode

from anyio.to_thread import run_sync
from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials

from omnivideo.api.dependencies import BEARER, ContextDep, ServiceContext, authenticate_owner
from omnivideo.api.errors import APIError

SignatureField = Annotated[str | None, Query(max_length=64, description="the signature of a link to media")]
OwnerField = Annotated[str | None, Query(max_length=64, description="whose link it is")]
ExpiryField = Annotated[int | None, Query(ge=0, le=10**12, description="when the link expires, in seconds since 1970")]


@dataclass(frozen=True)
class LinkBuilder:
    """Builds the links of one owner. `base_url` ends with a slash; without an admin key, links are not signed."""

    base_url: str
    owner: str
    admin_key: str
    lifetime_seconds: int

    def build_link(self, path: str, is_signed: bool = True) -> str:
        """Return the address of a path, such as `/v1/images/ID/content`; a browser can load it if it is signed."""
        address = f"{self.base_url}{path.removeprefix('/')}"
        if not self.admin_key or not is_signed:
            return address
        # The end is rounded, so that an answer has the same links for a while: valid for one to two lifetimes.
        expires = (int(time.time()) // self.lifetime_seconds + 2) * self.lifetime_seconds
        signature = sign_path(self.admin_key, path, self.owner, expires)
        return f"{address}?{urlencode({'owner': self.owner, 'expires': expires, 'signature': signature})}"


def create_link_builder(context: ServiceContext, owner: str, request_url: str = "/") -> LinkBuilder:
    """Return the builder of an owner's links, at the public address or, if none is set, where the request was sent."""
    settings = context.settings
    base_url = f"{settings.public_url.rstrip('/')}/" if settings.public_url else request_url
    return LinkBuilder(base_url, owner, settings.admin_key, settings.link_lifetime_seconds)


def sign_path(admin_key: str, path: str, owner: str, expires: int) -> str:
    signing_key = hashlib.sha256(f"omnivideo links {admin_key}".encode()).digest()
    return hmac.new(signing_key, f"{path}\n{owner}\n{expires}".encode(), hashlib.sha256).hexdigest()


async def authenticate_media_owner(
    request: Request,
    context: ContextDep,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)] = None,
    owner: OwnerField = None,
    expires: ExpiryField = None,
    signature: SignatureField = None,
) -> str:
    """Return the owner of a signed link, or of the request's API key. Raises APIError (401, or 403 for a bad link)."""
    admin_key = context.settings.admin_key
    if not admin_key or signature is None or credentials is not None:
        return await authenticate_owner(request, credentials)
    path = request.url.path.removeprefix(request.scope.get("root_path", ""))
    if owner is None or expires is None or not matches_signature(admin_key, path, owner, expires, signature):
        raise APIError(403, "signature: it does not fit this link", "signature", "invalid_link")
    if expires < time.time():
        raise APIError(403, "expires: this link has expired; ask for a new one", "expires", "link_expired")
    if not await run_sync(context.api_keys.is_active, owner):
        raise APIError(403, "owner: the key that this link belongs to is revoked", "owner", "invalid_link")
    request.state.owner = owner
    return owner


def matches_signature(admin_key: str, path: str, owner: str, expires: int, signature: str) -> bool:
    return hmac.compare_digest(sign_path(admin_key, path, owner, expires).encode(), signature.encode())


MediaOwnerDep = Annotated[str, Depends(authenticate_media_owner)]

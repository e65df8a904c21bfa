"""Create, check, limit, revoke and delete API keys. The database holds only their digests."""

import hashlib
import secrets
from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Engine, Row, and_, delete, insert, or_, select, update

from omnivideo.records import DEFAULT_SCOPES, SCOPES, APIKeyRecord, KeyLimits, Scope
from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import api_keys
from omnivideo.storage.database.usage import ADMIN_OWNER

ADMIN_KEY = APIKeyRecord(
    id=ADMIN_OWNER, name=ADMIN_OWNER, created_at=0.0, revoked=False, expires_at=None, scopes=SCOPES,
    own_limits={name: 0 for name in KeyLimits.model_fields if name != "open_jobs"},
)  # fmt: skip


def compute_key_digest(key: str) -> str:
    """Return the SHA-256 of a key. A key is 32 random bytes, which cannot be guessed, so it needs no salt."""
    return hashlib.sha256(key.encode()).hexdigest()


class APIKeyRepository(Repository):
    """API keys. `admin_key` is a further key, from the settings, whose owner is "admin"."""

    def __init__(self, engine: Engine, admin_key: str = ""):
        super().__init__(engine)
        self.admin_digest = compute_key_digest(admin_key) if admin_key else None

    @property
    def is_required(self) -> bool:
        """Return whether requests need a key: only if the operator has set an admin key."""
        return self.admin_digest is not None

    def create_key(
        self,
        name: str,
        scopes: Sequence[Scope] = DEFAULT_SCOPES,
        lifetime_seconds: float | None = None,
        own_limits: dict[str, float | None] | None = None,
    ) -> tuple[str, str]:
        """Create a key, which expires after `lifetime_seconds`. Return its id and the key, which cannot be read again.

        `own_limits` are fields of KeyLimits; None stands for the default.
        """
        key_id, key = f"key_{secrets.token_hex(8)}", f"ov_{secrets.token_urlsafe(32)}"
        values = {
            "id": key_id,
            "digest": compute_key_digest(key),
            "name": name,
            "created_at": unix_now(),
            "revoked": False,
            "scopes": " ".join(scopes),
            "expires_at": None if lifetime_seconds is None else unix_now() + lifetime_seconds,
            **(own_limits or {}),
        }
        self.fetch_all(insert(api_keys).values(values))
        return key_id, key

    def find_key(self, key: str) -> APIKeyRecord | None:
        """Return the record of a key, or None if the key is wrong or revoked, or has expired."""
        digest = compute_key_digest(key)
        if self.admin_digest and secrets.compare_digest(digest, self.admin_digest):
            return ADMIN_KEY
        row = self.fetch_one(select(api_keys).where(api_keys.c.digest == digest, match_valid_keys()))
        return None if row is None else key_from_row(row)

    def is_active(self, owner: str) -> bool:
        """Return whether there is a key with this id that is neither revoked nor expired."""
        if owner == ADMIN_OWNER:
            return self.admin_digest is not None
        return self.fetch_one(select(api_keys.c.id).where(api_keys.c.id == owner, match_valid_keys())) is not None

    def delete_key(self, key_id: str) -> None:
        self.fetch_all(delete(api_keys).where(api_keys.c.id == key_id))

    def update_key(self, key_id: str, lifetime_seconds: float | None = None, **values: Any) -> APIKeyRecord | None:
        """Set columns of a key, and let it expire in `lifetime_seconds` if given; 0 is never.

        Return the key, or None if there is none with that id.
        """
        if lifetime_seconds is not None:
            values["expires_at"] = unix_now() + lifetime_seconds if lifetime_seconds else None
        if not values:
            return self.get_key(key_id)
        change = update(api_keys).where(api_keys.c.id == key_id).values(values)
        row = self.fetch_one(change.returning(api_keys))
        return None if row is None else key_from_row(row)

    def get_key(self, key_id: str) -> APIKeyRecord | None:
        row = self.fetch_one(select(api_keys).where(api_keys.c.id == key_id))
        return None if row is None else key_from_row(row)

    def list_keys(self) -> list[APIKeyRecord]:
        return [key_from_row(row) for row in self.fetch_all(select(api_keys).order_by(api_keys.c.created_at))]


def match_valid_keys() -> ColumnElement[bool]:
    is_current = or_(api_keys.c.expires_at.is_(None), api_keys.c.expires_at > unix_now())
    return and_(api_keys.c.revoked.is_(False), is_current)


def key_from_row(row: Row[Any]) -> APIKeyRecord:
    scopes = DEFAULT_SCOPES if row.scopes is None else tuple(name for name in SCOPES if name in row.scopes.split())
    limits = {name: getattr(row, name) for name in KeyLimits.model_fields if getattr(row, name) is not None}
    return APIKeyRecord(
        id=row.id, name=row.name, created_at=row.created_at, revoked=row.revoked, expires_at=row.expires_at,
        scopes=scopes, own_limits=limits,
    )  # fmt: skip

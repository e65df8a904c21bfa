"""Create, check, revoke and delete API keys. The database holds only their digests."""

import hashlib
import secrets
from typing import Any

from sqlalchemy import Engine, and_, delete, insert, select, update

from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import api_keys

ADMIN_OWNER = "admin"  # of everything that is made with the admin key


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

    def create_key(self, name: str) -> tuple[str, str]:
        """Create a key. Return its id and the key itself, which cannot be read again."""
        key_id, key = f"key_{secrets.token_hex(8)}", f"ov_{secrets.token_urlsafe(32)}"
        values = {
            "id": key_id,
            "digest": compute_key_digest(key),
            "name": name,
            "created_at": unix_now(),
            "revoked": False,
        }
        self.fetch_all(insert(api_keys).values(values))
        return key_id, key

    def find_owner(self, key: str) -> str | None:
        """Return the owner of a key, or None if the key is wrong or revoked."""
        digest = compute_key_digest(key)
        if self.admin_digest and secrets.compare_digest(digest, self.admin_digest):
            return ADMIN_OWNER
        is_valid = and_(api_keys.c.digest == digest, api_keys.c.revoked.is_(False))
        row = self.fetch_one(select(api_keys.c.id).where(is_valid))
        return None if row is None else str(row.id)

    def is_active(self, owner: str) -> bool:
        """Return whether the key with this id exists and is not revoked; the admin key is active if it is set."""
        if owner == ADMIN_OWNER:
            return self.admin_digest is not None
        is_valid = and_(api_keys.c.id == owner, api_keys.c.revoked.is_(False))
        return self.fetch_one(select(api_keys.c.id).where(is_valid)) is not None

    def revoke_key(self, key_id: str) -> bool:
        """Revoke a key. Return False if there is none with that id."""
        revocation = update(api_keys).where(api_keys.c.id == key_id).values(revoked=True)
        return bool(self.fetch_all(revocation.returning(api_keys.c.id)))

    def delete_key(self, key_id: str) -> bool:
        """Delete a key. Return False if there is none with that id."""
        return bool(self.fetch_all(delete(api_keys).where(api_keys.c.id == key_id).returning(api_keys.c.id)))

    def list_keys(self) -> list[dict[str, Any]]:
        columns = select(api_keys.c.id, api_keys.c.name, api_keys.c.created_at, api_keys.c.revoked)
        return [dict(row._mapping) for row in self.fetch_all(columns.order_by(api_keys.c.created_at))]

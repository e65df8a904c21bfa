"""API keys: only their digests are kept."""

import hashlib
import secrets
from typing import Any

from sqlalchemy import Engine, insert, select, update

from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import api_keys


def compute_key_digest(key: str) -> str:
    # A key is 32 random bytes, so a plain digest is enough: there is nothing to guess.
    return hashlib.sha256(key.encode()).hexdigest()


class APIKeyRepository(Repository):
    """`admin_key` is one more key, from the settings; its owner is "admin"."""

    def __init__(self, engine: Engine, admin_key: str = ""):
        super().__init__(engine)
        self.admin_digest = compute_key_digest(admin_key) if admin_key else None

    @property
    def is_required(self) -> bool:
        """Whether a key is needed at all: not where the operator has set none."""
        return self.admin_digest is not None

    def create_key(self, name: str) -> tuple[str, str]:
        """The id and the key, which is told this once."""
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
        """Whose key it is; None for a wrong or a revoked one."""
        digest = compute_key_digest(key)
        if self.admin_digest and secrets.compare_digest(digest, self.admin_digest):
            return "admin"
        found = self.fetch_all(select(api_keys.c.id).where(api_keys.c.digest == digest, api_keys.c.revoked.is_(False)))
        return found[0].id if found else None

    def revoke_key(self, key_id: str) -> bool:
        """Whether there was such a key."""
        gone = update(api_keys).where(api_keys.c.id == key_id).values(revoked=True).returning(api_keys.c.id)
        return bool(self.fetch_all(gone))

    def list_keys(self) -> list[dict[str, Any]]:
        shown = select(api_keys.c.id, api_keys.c.name, api_keys.c.created_at, api_keys.c.revoked).order_by(
            api_keys.c.created_at
        )
        return [dict(row._mapping) for row in self.fetch_all(shown)]

"""API keys: only their digests are kept."""

import hashlib
import secrets
from typing import Any

from sqlalchemy import Engine, insert, select, update

from omnivideo.storage.database import Book, keys, now


def digest_of(key: str) -> str:
    # A key is 32 random bytes, so a plain digest is enough: there is nothing to guess.
    return hashlib.sha256(key.encode()).hexdigest()


class Keys(Book):
    """`admin` is one more key, from the settings; its owner is "admin"."""

    def __init__(self, engine: Engine, admin: str = ""):
        super().__init__(engine)
        self.admin = digest_of(admin) if admin else None

    @property
    def asked_for(self) -> bool:
        """Whether a key is needed at all: not where the operator has set none."""
        return self.admin is not None

    def add(self, name: str) -> tuple[str, str]:
        """The id and the key, which is told this once."""
        made, key = f"key_{secrets.token_hex(8)}", f"ov_{secrets.token_urlsafe(32)}"
        values = {"id": made, "digest": digest_of(key), "name": name, "made": now(), "revoked": False}
        self.all(insert(keys).values(values))
        return made, key

    def owner(self, key: str) -> str | None:
        """Whose key it is; None for a wrong or a revoked one."""
        digest = digest_of(key)
        if self.admin and secrets.compare_digest(digest, self.admin):
            return "admin"
        found = self.all(select(keys.c.id).where(keys.c.digest == digest, keys.c.revoked.is_(False)))
        return found[0].id if found else None

    def revoke(self, key_id: str) -> bool:
        """Whether there was such a key."""
        gone = update(keys).where(keys.c.id == key_id).values(revoked=True).returning(keys.c.id)
        return bool(self.all(gone))

    def listed(self) -> list[dict[str, Any]]:
        shown = select(keys.c.id, keys.c.name, keys.c.made, keys.c.revoked).order_by(keys.c.made)
        return [dict(row._mapping) for row in self.all(shown)]

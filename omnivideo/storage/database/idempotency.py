"""Idempotency keys: what each request with a key has created, and who creates it now."""

from sqlalchemy import and_, delete, select, update

from omnivideo.records import KeyClaim
from omnivideo.storage.database.repository import Repository, unix_now
from omnivideo.storage.database.schema import idempotency_keys


class IdempotencyRepository(Repository):
    """One request at a time has claimed a key: it looks for what the key has created, and creates it if necessary."""

    def claim_key(
        self, owner: str, key_digest: str, *, request_digest: str, resource_id: str, lease_seconds: float
    ) -> KeyClaim | None:
        """Claim a key, which is created with `resource_id` if it is new. Return None while another request has it.

        A key with another digest is not claimed, but returned, as the request is refused anyway.
        """
        values = {
            "owner": owner, "key_digest": key_digest, "request_digest": request_digest, "resource_id": resource_id,
            "claimed_until": unix_now() + lease_seconds, "waiting_clients": 0, "created_at": unix_now(),
        }  # fmt: skip
        insertion = self.insert_into(idempotency_keys).values(values).on_conflict_do_nothing()
        if (row := self.fetch_one(insertion.returning(idempotency_keys))) is not None:
            return KeyClaim(request_digest=request_digest, resource_id=resource_id, waiting_clients=0, is_new=True)
        is_key = and_(idempotency_keys.c.owner == owner, idempotency_keys.c.key_digest == key_digest)
        is_same_request = idempotency_keys.c.request_digest == request_digest
        is_free = idempotency_keys.c.claimed_until < unix_now()
        lease = {"claimed_until": unix_now() + lease_seconds}
        claim = update(idempotency_keys).where(is_key, is_same_request, is_free).values(lease)
        columns = (
            idempotency_keys.c.request_digest, idempotency_keys.c.resource_id, idempotency_keys.c.waiting_clients,
        )  # fmt: skip
        row = self.fetch_one(claim.returning(*columns))
        if row is None:
            row = self.fetch_one(select(*columns).where(is_key, ~is_same_request))
        return None if row is None else KeyClaim(**row._mapping)

    def set_key_resource(self, owner: str, key_digest: str, resource_id: str) -> None:
        """Record what is created for the key now, in place of what was created before."""
        self.update_key(owner, key_digest, resource_id=resource_id, waiting_clients=0)

    def release_key(self, owner: str, key_digest: str, waiting_clients: int | None = None) -> None:
        """Let other requests claim the key, and set the number of clients that wait for the result if it is given."""
        counts = {} if waiting_clients is None else {"waiting_clients": waiting_clients}
        self.update_key(owner, key_digest, claimed_until=0.0, **counts)

    def update_key(self, owner: str, key_digest: str, **values: object) -> None:
        is_key = and_(idempotency_keys.c.owner == owner, idempotency_keys.c.key_digest == key_digest)
        self.fetch_all(update(idempotency_keys).where(is_key).values(values))

    def delete_key(self, owner: str, key_digest: str) -> None:
        """Forget a key, because its request was refused."""
        is_key = and_(idempotency_keys.c.owner == owner, idempotency_keys.c.key_digest == key_digest)
        self.fetch_all(delete(idempotency_keys).where(is_key))

    def delete_old_keys(self, lifetime_seconds: float) -> None:
        """Forget the keys that are older than `lifetime_seconds`."""
        is_old = idempotency_keys.c.created_at < unix_now() - lifetime_seconds
        self.fetch_all(delete(idempotency_keys).where(is_old))

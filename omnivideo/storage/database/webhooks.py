"""Webhooks, and the deliveries that are due to them."""

import logging
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import String, and_, case, delete, func, literal, or_, select, union_all, update

from omnivideo.contracts import Change, FrozenModel
from omnivideo.errors import InvalidInput
from omnivideo.records import WebhookRecord
from omnivideo.storage.database.notifications import ANY_JOB_END, NEW_DELIVERY, Watch
from omnivideo.storage.database.repository import Repository, record_from_row, select_values, unix_now
from omnivideo.storage.database.schema import deleted_webhooks, webhook_deliveries, webhooks

log = logging.getLogger("omnivideo.hooks")
MAX_SENDER_LOSSES = 3  # the number of lost processes after which a delivery is given up
DELIVERY_RETENTION_SECONDS = 7 * 86_400  # how long a completed delivery is kept


class DeliveryRecord(FrozenModel):
    """An event for one webhook. `attempts` counts the attempts to deliver it, including the one under way."""

    id: str
    webhook_id: str
    body: dict[str, Any]
    attempts: int


class WebhookRepository(Repository):
    def create_webhook(
        self, owner: str, max_webhooks: int, *, webhook_id: str, url: str, secret: str, name: str,
        event_types: Sequence[str],
    ) -> WebhookRecord:  # fmt: skip
        """Create a webhook and return it. Raises InvalidInput if the owner already has `max_webhooks`."""
        values = {
            "id": webhook_id, "owner": owner, "url": url, "secret": secret, "name": name,
            "event_types": list(event_types), "created_at": unix_now(),
        }  # fmt: skip
        webhook_count = select(func.count()).where(webhooks.c.owner == owner).scalar_subquery()
        row_if_allowed = select_values(webhooks, values).where(webhook_count < max_webhooks)
        row = self.fetch_one(self.insert_into(webhooks).from_select(list(values), row_if_allowed).returning(webhooks))
        if row is None:
            raise InvalidInput("webhooks", f"you have {max_webhooks}, the maximum for one API key")
        return record_from_row(WebhookRecord, row)

    def get_webhook(self, webhook_id: str, owner: str) -> WebhookRecord | None:
        row = self.fetch_one(select(webhooks).where(webhooks.c.id == webhook_id, webhooks.c.owner == owner))
        return None if row is None else record_from_row(WebhookRecord, row)

    def list_webhooks(self, owner: str, after: str | None, limit: int) -> tuple[list[WebhookRecord], bool]:
        """Return a page of the owner's webhooks, newest first, and whether more follow."""
        cursor_query = union_all(
            *(
                select(table.c.created_at, table.c.id).where(table.c.owner == owner, table.c.id == after)
                for table in (webhooks, deleted_webhooks)
            )
        )
        rows, has_more = self.fetch_page(webhooks, webhooks.c.owner == owner, after, limit, True, cursor_query)
        return [record_from_row(WebhookRecord, row) for row in rows], has_more

    def delete_webhook(self, webhook_id: str, owner: str) -> bool:
        """Delete a webhook and its undelivered events. Return False if the owner has no such webhook."""
        is_webhook = and_(webhooks.c.id == webhook_id, webhooks.c.owner == owner)
        row = select(webhooks.c.id, webhooks.c.owner, webhooks.c.created_at).where(is_webhook)
        insertion = self.insert_into(deleted_webhooks).from_select(["id", "owner", "created_at"], row)
        self.fetch_all(insertion.on_conflict_do_nothing())
        return bool(self.fetch_all(delete(webhooks).where(is_webhook).returning(webhooks.c.id)))

    def update_webhook(self, webhook_id: str, owner: str, **values: Any) -> WebhookRecord | None:
        """Set columns of a webhook and return it, or None if the owner has no such webhook."""
        is_webhook = and_(webhooks.c.id == webhook_id, webhooks.c.owner == owner)
        row = self.fetch_one(update(webhooks).where(is_webhook).values(values).returning(webhooks))
        return None if row is None else record_from_row(WebhookRecord, row)

    def list_webhooks_of_owners(self, owners: Collection[str]) -> list[WebhookRecord]:
        rows = self.fetch_all(select(webhooks).where(webhooks.c.owner.in_(owners)))
        return [record_from_row(WebhookRecord, row) for row in rows]

    # ------------------------------------------------------------ deliveries

    def enqueue_deliveries(self, events: Sequence[tuple[str, str, dict[str, Any]]]) -> None:
        """Add deliveries that are due now, as (event id, webhook id, body), and notify the senders.

        A known event id changes nothing.
        """
        values = [
            {"id": event_id, "webhook_id": webhook_id, "body": body, "attempts": 0, "due_at": 0.0, "completed": False}
            for event_id, webhook_id, body in events
        ]
        insertion = self.insert_into(webhook_deliveries).values(values).on_conflict_do_nothing()
        notification = self.notifier.build_notification(literal(NEW_DELIVERY, String))
        if self.fetch_all(insertion.returning(webhook_deliveries.c.id, notification)):
            self.notifier.publish(Change(topic=NEW_DELIVERY))

    def watch_deliveries(self, poll_seconds: float) -> AbstractContextManager[Watch]:
        """Watch for new deliveries and for the ends of jobs, which cause them, in a thread."""
        return self.notifier.watch(NEW_DELIVERY, ANY_JOB_END, poll_seconds=poll_seconds)

    def get_seconds_until_due(self) -> float | None:
        """Return the seconds until the next delivery falls due, below 0 if it is due, or None if there is none."""
        is_open = webhook_deliveries.c.completed.is_(False)
        row = self.fetch_one(select(func.min(webhook_deliveries.c.due_at) - unix_now()).where(is_open))
        return None if row is None or row[0] is None else float(row[0])

    def claim_due_deliveries(
        self, limit: int, lease_seconds: float, excluded_owners: Collection[str] = ()
    ) -> list[tuple[DeliveryRecord, WebhookRecord | None]]:
        """Claim due deliveries, each with its webhook (None if deleted); owners are served in turn.

        A delivery falls due again after `lease_seconds` unless it is completed or postponed before. One that has lost
        MAX_SENDER_LOSSES processes in this way is given up.
        """
        self.give_up_poisonous_deliveries()
        is_due = and_(webhook_deliveries.c.completed.is_(False), webhook_deliveries.c.due_at <= unix_now())
        place = func.row_number().over(partition_by=webhooks.c.owner, order_by=webhook_deliveries.c.due_at)
        columns = select(webhook_deliveries.c.id, webhook_deliveries.c.due_at, place.label("place"))
        joined = columns.select_from(
            webhook_deliveries.outerjoin(webhooks, webhooks.c.id == webhook_deliveries.c.webhook_id)
        )
        is_allowed = or_(webhooks.c.owner.is_(None), webhooks.c.owner.not_in(excluded_owners))
        ranked = joined.where(is_due, is_allowed).subquery()
        next_ids = select(ranked.c.id).order_by(ranked.c.place, ranked.c.due_at).limit(limit)
        due_ids = select(webhook_deliveries.c.id).where(webhook_deliveries.c.id.in_(next_ids), is_due)
        values = {
            "due_at": unix_now() + lease_seconds, "attempts": webhook_deliveries.c.attempts + 1, "claimed": True,
            "sender_losses": webhook_deliveries.c.sender_losses + case((webhook_deliveries.c.claimed, 1), else_=0),
        }  # fmt: skip
        locked_ids = due_ids.with_for_update(skip_locked=True)
        claim = update(webhook_deliveries).where(webhook_deliveries.c.id.in_(locked_ids), is_due).values(values)
        rows = self.fetch_all(claim.returning(webhook_deliveries))
        deliveries = [record_from_row(DeliveryRecord, row) for row in rows]
        query = select(webhooks).where(webhooks.c.id.in_([delivery.webhook_id for delivery in deliveries]))
        webhooks_by_id = {row.id: record_from_row(WebhookRecord, row) for row in self.fetch_all(query)}
        return [(delivery, webhooks_by_id.get(delivery.webhook_id)) for delivery in deliveries]

    def give_up_poisonous_deliveries(self) -> list[str]:
        """Complete the due deliveries that have stopped MAX_SENDER_LOSSES processes, and return their ids."""
        is_lost = and_(
            webhook_deliveries.c.completed.is_(False),
            webhook_deliveries.c.due_at <= unix_now(),
            webhook_deliveries.c.claimed,
            webhook_deliveries.c.sender_losses >= MAX_SENDER_LOSSES - 1,
        )
        completion = update(webhook_deliveries).where(is_lost).values(completed=True)
        delivery_ids = [row.id for row in self.fetch_all(completion.returning(webhook_deliveries.c.id))]
        for delivery_id in delivery_ids:
            log.error("webhook delivery %s has stopped several processes and is given up", delivery_id)
        return delivery_ids

    def complete_delivery(self, delivery_id: str) -> None:
        """Mark a delivery as finished, whether it was delivered or given up."""
        self.fetch_all(update(webhook_deliveries).where(webhook_deliveries.c.id == delivery_id).values(completed=True))

    def postpone_delivery(self, delivery_id: str, delay_seconds: float) -> None:
        is_delivery = webhook_deliveries.c.id == delivery_id
        values = {"due_at": unix_now() + delay_seconds, "claimed": False}
        self.fetch_all(update(webhook_deliveries).where(is_delivery).values(values))

    def delete_old_deliveries(self) -> None:
        """Delete deliveries that were completed more than DELIVERY_RETENTION_SECONDS ago."""
        is_old = webhook_deliveries.c.due_at < unix_now() - DELIVERY_RETENTION_SECONDS
        self.fetch_all(delete(webhook_deliveries).where(webhook_deliveries.c.completed, is_old))

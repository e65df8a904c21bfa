"""Webhooks and their deliveries in a real database: SQLite and PostgreSQL."""

import pytest
from sqlalchemy import Engine

from omnivideo.errors import InvalidInput
from omnivideo.storage.database.webhooks import WebhookRecord, WebhookRepository
from tests.support.claims import claim_from_threads


@pytest.fixture
def webhooks(empty_database: Engine) -> WebhookRepository:
    return WebhookRepository(empty_database)


def create_webhook(webhooks: WebhookRepository, webhook_id: str, max_webhooks: int = 9) -> WebhookRecord:
    return webhooks.create_webhook(
        "ann", max_webhooks, webhook_id=webhook_id, url="https://a.test/", secret="whsec_", name="a", event_types=["x"]
    )


def test_the_webhooks_of_one_owner_are_limited(webhooks: WebhookRepository) -> None:
    assert create_webhook(webhooks, "one", max_webhooks=1).event_types == ["x"]
    with pytest.raises(InvalidInput, match="webhooks"):
        create_webhook(webhooks, "two", max_webhooks=1)
    assert webhooks.delete_webhook("one", "ann") and not webhooks.delete_webhook("one", "ann")


def test_an_event_is_delivered_once(webhooks: WebhookRepository) -> None:
    create_webhook(webhooks, "hook")
    for _ in range(2):
        webhooks.enqueue_deliveries([("event", "hook", {"created_at": 1})])
    ((delivery, webhook),) = webhooks.claim_due_deliveries(9, 60.0)
    assert (delivery.attempts, delivery.body) == (1, {"created_at": 1})
    assert webhook and webhook.id == "hook" and not webhooks.claim_due_deliveries(9, 60.0)
    webhooks.postpone_delivery("event", -1.0)
    webhooks.delete_webhook("hook", "ann")
    ((delivery, webhook),) = webhooks.claim_due_deliveries(9, -1.0)
    assert (delivery.attempts, webhook) == (2, None)
    webhooks.complete_delivery("event")
    webhooks.delete_old_deliveries()
    assert not webhooks.claim_due_deliveries(9, 60.0)


def test_several_senders_never_claim_the_same_delivery(webhooks: WebhookRepository) -> None:
    webhooks.enqueue_deliveries([(f"event{index}", "hook", {}) for index in range(40)])
    claimed_ids = claim_from_threads(lambda: [delivery.id for delivery, _ in webhooks.claim_due_deliveries(3, 60.0)])
    assert len(claimed_ids) == len(set(claimed_ids)) == 40


def test_a_delivery_that_stops_its_processes_is_given_up(webhooks: WebhookRepository) -> None:
    create_webhook(webhooks, "hook")
    webhooks.enqueue_deliveries([("event", "hook", {})])
    for attempts in (1, 2, 3):  # the lease has run out each time, without an outcome
        ((delivery, _),) = webhooks.claim_due_deliveries(9, -1.0)
        assert delivery.attempts == attempts
    assert not webhooks.claim_due_deliveries(9, -1.0) and webhooks.get_seconds_until_due() is None
    webhooks.enqueue_deliveries([("refused", "hook", {})])
    for _ in range(6):  # a receiver that refuses an event is no loss
        assert len(webhooks.claim_due_deliveries(9, -1.0)) == 1
        webhooks.postpone_delivery("refused", -1.0)


def test_deliveries_are_claimed_from_owners_in_turn(webhooks: WebhookRepository) -> None:
    for owner in ("ann", "bob", "eve"):
        webhooks.create_webhook(
            owner, 9, webhook_id=owner, url="https://a.test/", secret="whsec_", name="a", event_types=["x"]
        )
    webhooks.enqueue_deliveries([(f"{owner}{index}", owner, {}) for owner in ("ann", "bob") for index in range(20)])
    webhooks.enqueue_deliveries([("eve0", "eve", {})])
    claimed_ids = {delivery.id[:3] for delivery, _ in webhooks.claim_due_deliveries(3, 60.0)}
    assert claimed_ids == {"ann", "bob", "eve"}
    assert {delivery.id[:3] for delivery, _ in webhooks.claim_due_deliveries(9, 60.0, ["ann"])} == {"bob"}

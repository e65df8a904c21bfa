"""Lifecycle rules and unfinished uploads, on moto's emulation of S3, because rclone supports neither."""

import os
from pathlib import Path

import pytest

from omnivideo.errors import InvalidInput, StoreError
from omnivideo.storage.objects.local import DAY_SECONDS
from tests.support.object_stores import check_ranges, check_round_trip, store_on
from tests.support.s3_server import moto_server

minio = pytest.importorskip("minio", reason="minio is not installed (pip install minio); the S3 store was not tested")
from omnivideo.storage.objects.s3 import LIFECYCLE_RULE_ID  # noqa: E402


@pytest.fixture(scope="module")
def moto_address(tmp_path_factory):
    with moto_server(tmp_path_factory.mktemp("moto")) as address:
        yield address


def test_a_server_without_lifecycle_rules_is_reported(s3):
    for _ in range(2):  # without and with the bucket
        with pytest.raises(StoreError, match=r"it does not support lifecycle rules; use the sweep$"):
            s3.set_lifecycle_expiration(3)
        s3.put(b"clip", "mp4")


def test_setting_a_lifetime_keeps_other_rules(moto_address):
    store = store_on(moto_address, prefix="clips")
    store.set_lifecycle_expiration(3)
    theirs = minio.lifecycleconfig.Rule(
        minio.commonconfig.ENABLED, minio.commonconfig.Filter(prefix="logs/"), "theirs",
        expiration=minio.lifecycleconfig.Expiration(days=1),
    )  # fmt: skip
    rules = store.client.get_bucket_lifecycle(store.bucket).rules
    store.client.set_bucket_lifecycle(store.bucket, minio.lifecycleconfig.LifecycleConfig([*rules, theirs]))
    store.set_lifecycle_expiration(30)
    rules = {rule.rule_id: rule for rule in store.client.get_bucket_lifecycle(store.bucket).rules}
    assert set(rules) == {"theirs", LIFECYCLE_RULE_ID}
    assert rules[LIFECYCLE_RULE_ID].expiration.days == 30 and rules[LIFECYCLE_RULE_ID].rule_filter.prefix == "clips/"
    assert rules[LIFECYCLE_RULE_ID].abort_incomplete_multipart_upload.days_after_initiation == 1
    for days in (0, 40_000):
        with pytest.raises(InvalidInput, match=r"^days: 1 to 36500"):
            store.set_lifecycle_expiration(days)


def test_stale_uploads_are_aborted(moto_address):
    store = store_on(moto_address, prefix="clips")
    assert store.abort_stale_uploads(0) == 0
    store.put(b"clip", "mp4")
    for name in ("clips/ab/left", "elsewhere/left"):
        store.client._create_multipart_upload(store.bucket, name, {})
    assert (
        store.abort_stale_uploads(100 * 366 * DAY_SECONDS) == 0
    )  # recent uploads may be in progress; moto dates all of them to 2010
    assert store.abort_stale_uploads(0) == 1
    assert store.abort_stale_uploads(0) == 0
    remaining = store.client._list_multipart_uploads(store.bucket).uploads
    assert [upload.object_name for upload in remaining] == ["elsewhere/left"]


def test_moto_meets_the_contract_of_a_store(moto_address, tmp_path):
    store = store_on(moto_address)
    check_round_trip(store)
    check_ranges(store)
    path = Path(tmp_path / "large")
    path.write_bytes(os.urandom(34 << 20))
    key = store.put_file(path, "mp4")
    assert store.get(key) == path.read_bytes()
    assert len(store.sweep({key}, 0)) == len(list(store.iter_keys())) + 3

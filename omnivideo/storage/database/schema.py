"""The tables of the service's database.

The database is the only record of jobs, keys, files and batches; the broker only notifies workers of queued jobs.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    false,
    text,
)

metadata = MetaData()
IS_OPEN_TURN = text("state IN ('queued', 'running')")
IS_PRESENT_THREAD = text("NOT deleted")

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(200), primary_key=True),
    Column("owner", String(64), nullable=False),  # the API key's id, or "local"
    Column("lane", Integer, nullable=False),  # 0 interactive, 1 batch
    Column("fair_rank", Integer, nullable=False),  # the position in the lane's fair order
    Column("state", String(10), nullable=False),  # queued, running, done, failed, cancelled
    Column("attempt", Integer, nullable=False, default=0),  # the fencing number; each claim increments it
    Column("worker_losses", Integer, nullable=False, default=0),  # workers that were lost while rendering it
    # Whether the worker was told to stop: its end is then no loss.
    Column("worker_stopping", Boolean, nullable=False, default=False, server_default=false()),
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("body", JSON, nullable=False),  # contracts.Job
    Column("kind", String(10), nullable=False),  # the kind of request: video, image, turn
    Column("meta", JSON, nullable=False),  # further fields of that kind
    Column("turn_id", String(64)),  # the turn that the job is rendered for, which shows its steps and previews
    Column("deleted", Boolean, nullable=False, default=False),
    Column("announced", Boolean, nullable=False, default=False),  # whether webhooks have been notified of its end
    Column("step", Integer, nullable=False, default=0),
    Column("steps", Integer, nullable=False, default=0),
    Column("eta_seconds", Float, nullable=False, default=0.0),
    Column("preview", String(100)),  # the key of a PNG
    Column("resume_key", String(100)),  # the key of the denoising state to resume from
    Column("preset", String(64)),  # the preset that it needs; null: any, of a process of version 0.2
    Column("weights", String(64)),  # the digest of the weights of the worker that claimed it last
    Column("precision", String(40)),  # that worker's; a resume point fits only the same preset, weights and precision
    Column("batch_job_ids", JSON(none_as_null=True)),  # the jobs rendered in one pass, in order; null: alone
    Column("result", JSON),  # contracts.Artifact
    Column("code", String(40)),  # the error code of a failed job
    Column("error", String(1000)),
    Column("worker_name", String(100)),
    Column("created_at", Float, nullable=False),
    Column("notified_at", Float, nullable=False),  # when workers were last notified of it
    Column("started_at", Float),
    Column("heartbeat_at", Float),
    Column("ended_at", Float),
    Index("jobs_next", "state", "lane", "fair_rank", "created_at"),
    Index("jobs_owner", "owner", "lane", "state", "fair_rank"),
    Index("jobs_listed", "owner", "kind", "created_at"),
    Index("jobs_weights", "weights", "ended_at"),
    Index("jobs_announced", "announced", "kind", "state"),
)

job_totals = Table(  # of the ended jobs whose rows were removed, so that the metrics still count them
    "job_totals",
    metadata,
    Column("lane", Integer, primary_key=True, autoincrement=False),
    Column("state", String(10), primary_key=True),
    Column("jobs", Integer, nullable=False),
    Column("steps", BigInteger, nullable=False),  # denoising steps of jobs that are done
    Column("queued", JSON, nullable=False),  # records.DurationCounts
    Column("generated", JSON, nullable=False),  # records.DurationCounts
)

stored_objects = Table(  # what the service has written into the object store; others may write there too
    "stored_objects",
    metadata,
    Column("key", String(100), primary_key=True),
    Column("written_at", Float, nullable=False),  # before the latest write of these bytes
)

workers = Table(  # what each running worker reports of itself, for operators
    "workers",
    metadata,
    Column("name", String(200), primary_key=True),  # the host and the number of the process
    Column("preset", String(64), nullable=False),
    Column("weights", String(64), nullable=False),
    Column("precision", String(40), nullable=False),
    Column("placement", String(60), nullable=False),
    Column("parts", JSON, nullable=False),  # records.PartRecord
    Column("seen_at", Float, nullable=False),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("digest", String(64), nullable=False, unique=True),  # SHA-256 of the key; the key itself is not stored
    Column("name", String(100), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("revoked", Boolean, nullable=False, default=False),
    Column("scopes", String(60)),  # separated by blanks; null: those of a key of version 0.2
    Column("expires_at", Float),  # null: never
    # What the key may use (records.KeyLimits). Null: as the settings say; 0: without a limit.
    Column("requests_per_minute", Integer),
    Column("open_jobs", Integer),
    Column("device_seconds_per_day", Float),
    Column("stored_bytes_per_day", BigInteger),
)

usage_days = Table(  # what each key has used on each day (UTC)
    "usage_days",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("day", Integer, primary_key=True, autoincrement=False),  # since 1970
    Column("clips", Integer, nullable=False, default=0),
    Column("images", Integer, nullable=False, default=0),
    Column("steps", BigInteger, nullable=False, default=0),  # denoising steps
    Column("device_seconds", Float, nullable=False, default=0.0),  # of workers, in all attempts
    Column("prompt_tokens", BigInteger, nullable=False, default=0),
    Column("answer_tokens", BigInteger, nullable=False, default=0),
    Column("stored_bytes", BigInteger, nullable=False, default=0),  # written on that day, also if deleted since
    Index("usage_days_day", "day"),
)

request_windows = Table(  # the requests of each key with a limit, in its current minute
    "request_windows",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("started_at", Float, nullable=False),
    Column("request_count", Integer, nullable=False),
)

files = Table(
    "files",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("name", String(255), nullable=False),
    Column("purpose", String(40), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("object_key", String(100), nullable=False),  # in the object store
    Column("artifact", JSON),  # contracts.Artifact of an image or a clip
    Column("created_at", Float, nullable=False),
    Column("expires_at", Float),  # when the file is deleted; null: never
    Column("deleted", Boolean, nullable=False, default=False),
    Index("files_listed", "owner", "created_at"),
)

batches = Table(
    "batches",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("state", String(12), nullable=False),  # as in the API: validating ... cancelled
    Column("endpoint", String(40), nullable=False),
    Column("input_file_id", String(64), nullable=False),  # of files
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    Column("counts", JSON, nullable=False),  # total, completed, failed
    Column("metadata", JSON, nullable=False),
    Column("validation_errors", JSON),  # the errors of a failed batch
    Column("state_times", JSON, nullable=False),  # when each state began, in seconds since 1970
    Column("runner_name", String(100)),
    Column("runner_losses", Integer, nullable=False, default=0, server_default="0"),  # runners lost while working on it
    Column("heartbeat_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted", Boolean, nullable=False, default=False, server_default=false()),
    Column("last_line", Integer),  # the number of the input's last line; null: it was not read yet
    Index("batches_listed", "owner", "created_at"),
    Index("batches_open", "state", "heartbeat_at"),
)

batch_lines = Table(  # the outcomes of the lines of an unfinished batch
    "batch_lines",
    metadata,
    Column("batch_id", String(64), primary_key=True),
    Column("line_number", Integer, primary_key=True),  # in the input file, from 1
    Column("succeeded", Boolean, nullable=False),
    Column("output_line", JSON, nullable=False),  # the line of the output or error file
)

idempotency_keys = Table(  # the idempotency keys of POST requests, and what was created for them
    "idempotency_keys",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("key_digest", String(64), primary_key=True),  # SHA-256 of the key
    Column("request_digest", String(64), nullable=False),  # of the path and the fields
    Column("resource_id", String(64), nullable=False),  # what the latest of these requests creates or has created
    Column("claimed_until", Float, nullable=False),  # while a request with this key creates it; 0 afterwards
    Column("waiting_clients", Integer, nullable=False, default=0),  # the clients that wait for the result
    Column("created_at", Float, nullable=False),
    Index("idempotency_keys_created", "created_at"),
)

threads = Table(
    "threads",
    metadata,
    Column("id", String(64), primary_key=True),  # also of its checkpoints
    Column("client_id", String(64)),  # the id by which the owner knows it; null: `id` (of an older version)
    Column("owner", String(64), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("deleted", Boolean, nullable=False, default=False),
    Column("forked_from", String(64)),  # the thread that it begins with
    Column("forked_after", Integer),  # the number of that thread's turns that it begins with
    Column("used_at", Float),  # when its last turn began; null: an older version has made it
    Index("threads_listed", "owner", "created_at"),
    Index(
        "threads_known", "owner", "client_id", unique=True,
        sqlite_where=IS_PRESENT_THREAD, postgresql_where=IS_PRESENT_THREAD,
    ),
)  # fmt: skip


turns = Table(
    "turns",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("thread_id", String(64), nullable=False),
    Column("owner", String(64), nullable=False),
    Column("state", String(10), nullable=False),  # queued, running, done, asks, failed, cancelled
    Column("number", Integer, nullable=False),  # within the thread, from 1
    Column("cancel_requested", Boolean, nullable=False, default=False),
    Column("body", JSON, nullable=False),  # text, attachments and options
    Column("error", JSON),  # the API's error object of a failed turn
    Column("attempt", Integer, nullable=False, default=0),
    Column("process_losses", Integer, nullable=False, default=0, server_default="0"),  # processes lost while running it
    Column("heartbeat_at", Float, nullable=False),
    Column("created_at", Float, nullable=False),
    Index("turns_open", "state", "heartbeat_at"),
    Index("turns_one_open", "thread_id", unique=True, sqlite_where=IS_OPEN_TURN, postgresql_where=IS_OPEN_TURN),
    Index("turns_thread", "thread_id", "created_at"),
)

turn_events = Table(
    "turn_events",
    metadata,
    Column("turn_id", String(64), primary_key=True),  # of turns
    Column("number", Integer, primary_key=True),  # from 1
    Column("body", JSON, nullable=False),  # omnivideo.turns.TurnEvent
    Column("created_at", Float, nullable=False),
    Index("turn_events_created", "created_at"),
)

chat_threads = Table(  # the threads that chat clients' messages belong to
    "chat_threads",
    metadata,
    Column("owner", String(64), primary_key=True),
    Column("messages_digest", String(64), primary_key=True),  # of all messages so far
    Column("thread_id", String(64), nullable=False),
    Column("turn_count", Integer, nullable=False),  # of the thread after these messages
    Column("created_at", Float, nullable=False),
)

webhooks = Table(
    "webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("url", String(2000), nullable=False),
    Column("secret", String(100), nullable=False),
    Column("name", String(100), nullable=False),
    Column("event_types", JSON, nullable=False),  # the types that it receives
    Column("created_at", Float, nullable=False),
    Index("webhooks_owner", "owner"),
)

deleted_webhooks = Table(  # so that paging can continue after a webhook that was deleted
    "deleted_webhooks",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("owner", String(64), nullable=False),
    Column("created_at", Float, nullable=False),  # of the webhook
)

webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("webhook_id", String(64), nullable=False),
    Column("body", JSON, nullable=False),
    Column("attempts", Integer, nullable=False, default=0),
    Column("due_at", Float, nullable=False),
    Column("completed", Boolean, nullable=False, default=False),
    Column("claimed", Boolean, nullable=False, default=False, server_default=false()),  # while a process sends it
    Column("sender_losses", Integer, nullable=False, default=0, server_default="0"),  # processes lost while sending it
    Index("webhook_deliveries_due", "completed", "due_at"),
)

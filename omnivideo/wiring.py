"""The composition root: it builds the implementation of each port that the settings select.

Without settings everything is embedded: SQLite and files in the home folder, the MLLM and a worker in this process
or, for `omnivideo serve`, in the one that it starts for the turns.
Only embedded parts load torch.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from omnivideo.agent.conversations import LOCAL_OWNER, Conversations, OpenQueue
from omnivideo.contracts import Artifact, Change, Lane
from omnivideo.errors import InvalidInput
from omnivideo.media.artifacts import StoreMediaTools, store_user_file
from omnivideo.ports import MLLM, JobQueue, ObjectStore, SweepableObjectStore, TextLimits
from omnivideo.presets import get_preset
from omnivideo.records import KeyLimits
from omnivideo.settings import ServiceSettings
from omnivideo.startup import pause_collection
from omnivideo.storage.checkpointer import migrate_checkpoints, open_checkpointer
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.storage.objects.metered import MeteredObjectStore

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from omnivideo.api.dependencies import ServiceContext
    from omnivideo.api.turn_process import TurnProcess
    from omnivideo.api.turn_runner import TurnRunner
    from omnivideo.backends.decoder.renderer import Renderer
    from omnivideo.backends.decoder.worker import Worker
    from omnivideo.backends.mllm.remote import RemoteMLLM
    from omnivideo.storage.database.batches import BatchRepository
    from omnivideo.storage.database.files import FileRepository
    from omnivideo.storage.database.idempotency import IdempotencyRepository
    from omnivideo.storage.database.jobs import JobRepository
    from omnivideo.storage.database.notifications import ChangeNotifier
    from omnivideo.storage.database.turns import TurnRepository
    from omnivideo.storage.database.usage import UsageRepository
    from omnivideo.storage.database.webhooks import WebhookRepository
    from omnivideo.storage.sweep import Checkpoints, Sweep, SweepResult


log = logging.getLogger("omnivideo.wiring")
SWEEP_SECONDS = 3600.0  # between two sweeps of an embedded service


def connect_mllm(settings: ServiceSettings, store: ObjectStore) -> "RemoteMLLM | None":
    """Return the MLLM behind its own server, or None if the settings name none."""
    if not settings.mllm:
        return None
    from omnivideo.backends.mllm.remote import RemoteMLLM

    return RemoteMLLM(settings.mllm, store, settings.mllm_timeout_seconds, settings.mllm_key)


class ServiceWiring:
    """The parts of the service. Each is built when it is first used."""

    def __init__(self, settings: ServiceSettings, device: str = "auto", has_worker: bool = True):
        self.settings = settings
        self.device = device
        self.has_worker = has_worker  # if there is no broker; otherwise the service's other process has it
        self.close_callbacks: list[Callable[[], None]] = []

    @cached_property
    def store(self) -> SweepableObjectStore:
        settings, announce = self.settings, self.jobs.announce_object
        if not settings.s3:
            return LocalObjectStore(settings.home / "store", announce)
        from omnivideo.storage.objects.s3 import S3ObjectStore

        return S3ObjectStore(
            settings.s3,
            settings.s3_bucket,
            settings.s3_access_key,
            settings.s3_secret_key,
            region=settings.s3_region,
            public_address=settings.s3_public,
            announce=announce,
        )

    @cached_property
    def engine(self) -> "Engine":
        """The database, with its schema up to date. SQLite is upgraded; PostgreSQL is only checked."""
        from omnivideo.storage.database.engine import check_schema, upgrade_schema

        engine = self.open_engine()
        try:
            if self.settings.database:
                check_schema(engine)
            else:
                upgrade_schema(engine, preset=get_preset(self.settings.preset))
        except BaseException:
            engine.dispose()
            raise
        self.close_callbacks.append(engine.dispose)
        return engine

    def open_engine(self) -> "Engine":
        """Return the database, whose schema may be missing or of an earlier version."""
        from omnivideo.storage.database.engine import create_database_engine

        settings = self.settings
        if not settings.database:
            create_home_folder(settings.home)
        return create_database_engine(settings.database or f"sqlite:///{settings.home / 'service.sqlite'}")

    @property
    def notifier(self) -> "ChangeNotifier":
        from omnivideo.storage.database.notifications import get_notifier

        return get_notifier(self.engine)

    def migrate_database(self) -> None:
        """Create all tables of the database and of the conversations, or bring them up to date."""
        from omnivideo.storage.database.engine import upgrade_schema

        engine = self.open_engine()
        try:
            upgrade_schema(engine, preset=get_preset(self.settings.preset))
            migrate_checkpoints(self.settings, engine)
        finally:
            engine.dispose()

    @cached_property
    def jobs(self) -> "JobRepository":
        from omnivideo.storage.database.jobs import JobRepository

        settings = self.settings
        limits = settings.max_queued_jobs, settings.max_open_jobs_per_key
        return JobRepository(self.engine, *limits, settings.resume_timeout, self.key_limits)

    @cached_property
    def key_limits(self) -> KeyLimits:
        """The limits of keys that have no own ones."""
        settings = self.settings
        return KeyLimits(
            requests_per_minute=settings.max_requests_per_minute_per_key,
            open_jobs=settings.max_open_jobs_per_key,
            device_seconds_per_day=settings.max_device_seconds_per_day_per_key,
            stored_bytes_per_day=settings.max_stored_bytes_per_day_per_key,
        )

    @cached_property
    def usage(self) -> "UsageRepository":
        from omnivideo.storage.database.usage import UsageRepository

        return UsageRepository(self.engine, self.key_limits)

    @cached_property
    def files(self) -> "FileRepository":
        from omnivideo.storage.database.files import FileRepository

        return FileRepository(self.engine)

    @cached_property
    def batches(self) -> "BatchRepository":
        from omnivideo.storage.database.batches import BatchRepository

        return BatchRepository(self.engine)

    @cached_property
    def webhooks(self) -> "WebhookRepository":
        from omnivideo.storage.database.webhooks import WebhookRepository

        return WebhookRepository(self.engine)

    @cached_property
    def idempotency_keys(self) -> "IdempotencyRepository":
        from omnivideo.storage.database.idempotency import IdempotencyRepository

        return IdempotencyRepository(self.engine)

    @cached_property
    def turns(self) -> "TurnRepository":
        from omnivideo.storage.database.turns import TurnRepository

        return TurnRepository(self.engine)

    @cached_property
    def renderer(self) -> "Renderer":
        with pause_collection():
            from omnivideo.backends.decoder.renderer import Renderer
            from omnivideo.models.device import pick_device
            from omnivideo.models.weights import checkpoint
            from omnivideo.models.weights.checkpoint import Contents
            from omnivideo.models.weights.digests import compute_folder_digest
            from omnivideo.models.weights.shipped import check_preset, find_shipped_weights

        folder = Path(self.settings.weights) if self.settings.weights else find_shipped_weights(self.settings.preset)
        check_preset(folder, self.settings.preset, "OMNIVIDEO_PRESET")
        contents: Contents = "without-mllm" if self.settings.mllm else "all"
        digest = compute_folder_digest(folder, self.settings.home)
        with pause_collection():
            omni = checkpoint.load(folder, pick_device(self.device), self.settings.precision, contents)
        digest.check_unchanged()
        if omni.placement:
            log.info("placement of %s: %s", omni.preset.name, omni.placement.describe())
        return Renderer(omni, self.store, digest.value, mllm=self.remote_mllm)

    @cached_property
    def worker(self) -> "Worker":
        from omnivideo.backends.decoder.worker import Worker, WorkerConfig

        settings = self.settings
        max_batch_size = settings.max_batch_size or get_preset(settings.preset).max_batch_size
        worker_config = WorkerConfig(
            settings.save_state_every_steps,
            settings.save_state_every_seconds,
            settings.heartbeat_timeout,
            max_batch_size,
        )
        return Worker(self.renderer, self.jobs, worker_config)

    @cached_property
    def mllm(self) -> MLLM:
        return self.remote_mllm or self.renderer.mllm

    def leave_out_mllm(self) -> "ServiceWiring":
        """Load no MLLM, for a process that asks it nothing, such as a sweep."""
        self.__dict__["mllm"] = None
        return self

    @cached_property
    def remote_mllm(self) -> "RemoteMLLM | None":
        """The MLLM behind its own server, or None if it runs in this process."""
        remote = connect_mllm(self.settings, self.store)
        if remote is not None:
            self.close_callbacks.append(remote.close)
        return remote

    @cached_property
    def queue_name(self) -> str:
        """The name of the broker's queue, which follows from the database, so that services may share a broker."""
        from omnivideo.backends.queue.celery import build_queue_name
        from omnivideo.storage.database.engine import identify_database

        return build_queue_name(identify_database(self.engine))

    @cached_property
    def notify_workers(self) -> Callable[[], None]:
        """Notify the workers that there is work. Without a broker, a worker is started in this process."""
        from omnivideo.backends.queue.reaper import Reaper
        from omnivideo.storage.database.notifications import NEW_JOB

        if not self.settings.broker and not self.has_worker:
            return partial(self.notifier.publish, Change(topic=NEW_JOB))
        if self.settings.broker:
            from omnivideo.backends.queue.celery import BackgroundNotifier, create_celery_app

            app = create_celery_app(self.settings.broker, self.queue_name)
            notify = BackgroundNotifier(app).start().notify_workers
        else:
            from omnivideo.backends.decoder.worker import InProcessWorker

            workers = InProcessWorker(self.worker).start()
            notify, notices = workers.notify_workers, ExitStack()
            notices.enter_context(self.notifier.subscribe((NEW_JOB,), lambda _: notify()))
            self.close_callbacks += [workers.stop, notices.close]
        reaper = Reaper(self.jobs, self.settings.heartbeat_timeout, notify).start()
        self.close_callbacks.append(reaper.stop)
        return notify

    @cached_property
    def open_queue(self) -> OpenQueue:
        """The durable queues of all owners' jobs. Workers are reached at the first job: a sweep reads threads only."""
        from omnivideo.backends.queue.durable import DurableQueue

        def open_queue(owner: str, lane: Lane = "interactive", /) -> JobQueue:
            return DurableQueue(self.jobs, self.store, self, owner, lane)

        return open_queue

    @cached_property
    def text_limits(self) -> TextLimits:
        """The bounds for texts. Without weights on this machine, the machines of the models count the tokens."""
        from omnivideo.models.text_limits import TokenLimits
        from omnivideo.models.weights.shipped import check_preset, find_weights

        folder = find_weights(self.settings.preset, self.settings.weights)
        if folder is not None:
            check_preset(folder, self.settings.preset, "OMNIVIDEO_PRESET")
        return TokenLimits(get_preset(self.settings.preset), folder)

    @cached_property
    def conversations(self) -> Conversations:
        saver, preset = open_checkpointer(self.settings), get_preset(self.settings.preset)
        conversations = Conversations(
            self.mllm,
            self.open_queue,
            self.store,
            saver,
            partial(store_user_file, self.store),
            preset,
            lambda owner: StoreMediaTools(MeteredObjectStore(self.store, self.usage, owner)),
            self.settings.max_generations_per_turn,
            self.text_limits,
        )
        self.close_callbacks.append(conversations.close)
        return conversations

    def build_service_context(self, turn_process: "TurnProcess | None" = None) -> "ServiceContext":
        """Build what the HTTP service's routes use. Without a process for the turns, they run in this one."""
        from omnivideo.api import bulkheads
        from omnivideo.api.access import AccessControl
        from omnivideo.api.dependencies import ServiceContext
        from omnivideo.backends.webhooks import check_reachable
        from omnivideo.media import ingest
        from omnivideo.media.thumbnails import create_picture_renderer
        from omnivideo.storage.database.keys import APIKeyRepository
        from omnivideo.storage.database.workers import WorkerRepository

        settings, api_keys = self.settings, APIKeyRepository(self.engine, self.settings.admin_key)
        threads = bulkheads.MAX_DECODING_THREADS, bulkheads.MAX_DECODING_THREADS_PER_OWNER
        decoding = bulkheads.Bulkhead("media", *threads)

        def ingest_media(owner: str, source: bytes | BinaryIO, created_by: str, name: str = "", /) -> Artifact:
            with decoding.enter(owner):
                return ingest.ingest_media(self.store, source, created_by, name, owner=owner)

        def fetch_media(url: str) -> bytes:
            limits = settings.max_upload_bytes, settings.fetch_timeout_seconds
            if url.startswith("data:"):
                return ingest.decode_data_url(url, settings.max_upload_bytes)
            return ingest.fetch_media(url, settings.media_hosts, *limits, extra_ports=settings.media_ports)

        return ServiceContext(
            settings=settings,
            text_limits=self.text_limits,
            store=bulkheads.BoundedObjectStore(self.store, bulkheads.Bulkhead("store", bulkheads.MAX_STORE_THREADS)),
            jobs=self.jobs,
            api_keys=api_keys,
            access=AccessControl(api_keys, self.usage, self.key_limits, LOCAL_OWNER),
            usage=self.usage,
            files=self.files,
            batches=self.batches,
            webhooks=self.webhooks,
            idempotency_keys=self.idempotency_keys,
            workers=WorkerRepository(self.engine),
            turns=self.turns,
            conversations=self.conversations,
            turn_runner=self.turn_runner,
            turn_process=turn_process,
            ingest_media=ingest_media,
            fetch_media=decoding.wrap(fetch_media),
            notify_workers=self.notify_workers,
            render_thumbnail=decoding.wrap(create_picture_renderer(self.store)),
            check_webhook_url=partial(check_reachable, internal_hosts=settings.webhook_hosts),
            mllm_server=self.remote_mllm,
            fetch_mllm_metrics=getattr(self.mllm, "fetch_metrics", None),
        )

    @cached_property
    def turn_runner(self) -> "TurnRunner":
        from omnivideo.api.turn_runner import TurnRunner

        timeout = self.settings.heartbeat_timeout
        return TurnRunner(self.turns, self.jobs, self.conversations, timeout, usage=self.usage)

    def start_background_services(self, context: "ServiceContext") -> "ServiceContext":
        """Start the batch runner, the webhook sender and the sweep in the background. Return the same context."""
        from omnivideo.api.routes import chat
        from omnivideo.api.routes.batches import BatchLineHandler
        from omnivideo.backends.batches.runner import BatchRunner
        from omnivideo.backends.periodic import PeriodicThread
        from omnivideo.backends.webhooks import POLL_SECONDS, WebhookSender
        from omnivideo.storage.database.notifications import SQLITE_POLL_SECONDS

        settings, send_chat_request = self.settings, partial(chat.run_chat_request, context)
        runner = BatchRunner(
            self.batches,
            self.files,
            self.jobs,
            self.store,
            self.notify_workers,
            BatchLineHandler(context),
            send_chat_request,
            settings.heartbeat_timeout,
        )
        # SQLite cannot notify this process of jobs that a broker's workers end.
        poll_seconds = SQLITE_POLL_SECONDS if settings.broker and not settings.database else POLL_SECONDS
        sender = WebhookSender(self.webhooks, self.jobs, settings.webhook_hosts, poll_seconds)
        self.close_callbacks += [runner.start().stop, sender.start().stop]
        if not settings.database:  # otherwise a process of its own runs `omnivideo sweep`
            self.close_callbacks.append(PeriodicThread("sweep", SWEEP_SECONDS, self.sweep, log).start().stop)
        return context

    def build_sweep(self) -> "Sweep":
        from omnivideo.storage.database.retention import RetentionRepository
        from omnivideo.storage.sweep import Lifetimes, Sweep

        settings, conversations = self.settings, self.conversations
        artifact_seconds = settings.artifact_lifetime_seconds

        def collect_referenced_keys() -> set[str]:
            keys = conversations.collect_referenced_keys() | self.jobs.collect_referenced_keys(artifact_seconds)
            keys |= conversations.collect_replay_keys(keys)
            return keys | self.files.collect_referenced_keys() | self.turns.collect_referenced_keys()

        return Sweep(
            RetentionRepository(self.engine),
            self.jobs,
            self.turns,
            cast("Checkpoints", conversations.checkpointer),
            self.store,
            collect_referenced_keys,
            # A video is listed as long as its clip exists.
            Lifetimes(
                artifact_seconds,
                settings.turn_lifetime_seconds,
                max(settings.job_lifetime_seconds, artifact_seconds),
                settings.thread_lifetime_seconds,
            ),
        )

    def sweep(self) -> "SweepResult":
        """Remove what was deleted, what has ended long ago, and objects that nothing refers to.

        Idempotency keys are forgotten after the lifetime of artifacts.
        """
        self.idempotency_keys.delete_old_keys(self.settings.artifact_lifetime_seconds)
        self.usage.delete_old_usage()
        return self.build_sweep().run()

    def close(self) -> None:
        """Stop everything that was started, in reverse order, even if one of them fails to stop."""
        while self.close_callbacks:
            try:
                self.close_callbacks.pop()()
            except Exception:
                log.exception("a part of the service did not stop cleanly")


def create_home_folder(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise InvalidInput("OMNIVIDEO_HOME", "the folder cannot be created; give one that can be written") from None

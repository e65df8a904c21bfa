"""The composition root: the settings say which room stands behind each port.

Whatever is not named in the settings is embedded: SQLite and a folder under the home, the MLLM and a worker in this
process.  Only what is embedded loads torch.
"""

from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omnivideo.backends.media import attached
from omnivideo.conversations import LOCAL, Conversations, saver_for
from omnivideo.errors import InvalidInput
from omnivideo.ports import MLLM, JobQueue, Keeper
from omnivideo.presets import preset
from omnivideo.settings import Service
from omnivideo.storage.local import LocalStore

if TYPE_CHECKING:
    from omnivideo.api.rooms import Rooms
    from omnivideo.backends.decoder.painter import Painter
    from omnivideo.backends.decoder.worker import Worker
    from omnivideo.models.omni import Omni
    from omnivideo.storage.jobs import Jobs


def in_process(omni: "Omni", digest: str, chosen: Service) -> Conversations:
    """The Studio's wiring: a clip is drawn while it is followed, here; so is the MLLM, unless the settings name one."""
    from omnivideo.backends.decoder.local import LocalQueue
    from omnivideo.backends.decoder.painter import Painter
    from omnivideo.backends.mllm.remote import RemoteMLLM

    store = LocalStore(chosen.home / "store")
    painter = Painter(omni, store, digest)
    queue = LocalQueue(painter)
    return Conversations(
        mllm=RemoteMLLM(chosen.mllm, store) if chosen.mllm else painter.mllm,
        queue_for=lambda owner: queue,
        store=store,
        saver=saver_for(chosen),
        attach=lambda path, made_by: attached(store, path, made_by),
        preset=omni.preset.name,
        redraw=painter.redrawn,
    )


class Wiring:
    """The service's rooms, each made when it is first needed."""

    def __init__(self, chosen: Service, device: str = "auto"):
        self.settings = chosen
        self.device = device
        self.closing: list[Callable[[], None]] = []

    @cached_property
    def store(self) -> Keeper:
        chosen = self.settings
        if not chosen.s3:
            return LocalStore(chosen.home / "store")
        from omnivideo.storage.minio import S3Store

        return S3Store(
            chosen.s3,
            chosen.s3_bucket,
            chosen.s3_access_key,
            chosen.s3_secret_key,
            region=chosen.s3_region,
            public_address=chosen.s3_public,
        )

    @cached_property
    def engine(self) -> Any:
        """The database, at the newest schema."""
        from omnivideo.storage.database import engine_for, migrate

        chosen = self.settings
        if not chosen.database:
            make_home(chosen.home)
        engine = engine_for(chosen.database or f"sqlite:///{chosen.home / 'service.sqlite'}")
        migrate(engine)
        self.closing.append(engine.dispose)
        return engine

    @cached_property
    def jobs(self) -> "Jobs":
        from omnivideo.storage.jobs import Jobs

        return Jobs(self.engine, self.settings.queue_most, self.settings.key_most)

    @cached_property
    def painter(self) -> "Painter":
        from omnivideo.backends.decoder.painter import Painter
        from omnivideo.models import checkpoint
        from omnivideo.studio import pick_device, shipped

        folder = Path(self.settings.weights) if self.settings.weights else shipped(self.settings.preset)
        omni = checkpoint.load(folder, pick_device(self.device))
        return Painter(omni, self.store, checkpoint.weights_digest(folder))

    @cached_property
    def worker(self) -> "Worker":
        from omnivideo.backends.decoder.worker import Habits, Worker

        chosen = self.settings
        together = chosen.together or preset(chosen.preset).together
        habits = Habits(chosen.resume_steps, chosen.resume_seconds, chosen.lost_after, together)
        return Worker(self.painter, self.jobs, habits)

    @cached_property
    def mllm(self) -> MLLM:
        if self.settings.mllm:
            from omnivideo.backends.mllm.remote import RemoteMLLM

            away = RemoteMLLM(self.settings.mllm, self.store)
            self.closing.append(away.close)
            return away
        return self.painter.mllm

    @cached_property
    def tell(self) -> Callable[[], None]:
        """Lets workers know that there is work; without a broker, this process works itself."""
        from omnivideo.backends.broker import Reaper, celery_app, teller

        if self.settings.broker:
            tell = teller(celery_app(self.settings.broker))
        else:
            from omnivideo.backends.decoder.workers import LocalWorkers

            workers = LocalWorkers(self.worker).start()
            self.closing.append(workers.stop)
            tell = workers.tell
        reaper = Reaper(self.jobs, self.settings.lost_after, tell).start()
        self.closing.append(reaper.stop)
        return tell

    def queue(self, owner: str = LOCAL) -> JobQueue:
        from omnivideo.backends.jobs import DurableQueue

        return DurableQueue(self.jobs, self.store, self.tell, owner)

    @cached_property
    def conversations(self) -> Conversations:
        saver = saver_for(self.settings)
        made = Conversations(self.mllm, self.queue, self.store, saver, self.attach, self.settings.preset)
        self.closing.append(made.close)
        return made

    def rooms(self) -> "Rooms":
        """What the HTTP service stands on."""
        from omnivideo.api.rooms import Rooms
        from omnivideo.api.running import Runner
        from omnivideo.backends import incoming
        from omnivideo.backends.hooks import reachable
        from omnivideo.backends.pictures import pictures
        from omnivideo.storage.keys import Keys
        from omnivideo.storage.records import Records
        from omnivideo.storage.turns import Turns

        chosen = self.settings

        def fetched(url: str) -> bytes:
            if url.startswith("data:"):
                return incoming.data_url(url, chosen.upload_most)
            most, seconds, ports = chosen.upload_most, chosen.fetch_seconds, chosen.media_ports
            return incoming.fetch(url, chosen.media_hosts, most, seconds, ports=ports)

        made = Rooms(
            settings=chosen,
            store=self.store,
            jobs=self.jobs,
            keys=Keys(self.engine, chosen.admin_key),
            records=Records(self.engine),
            turns=Turns(self.engine),
            conversations=self.conversations,
            taken=lambda data, made_by, name="": incoming.taken(self.store, data, made_by, name),
            fetched=fetched,
            tell=self.tell,
            pictured=pictures(self.store),
            reachable=partial(reachable, inside=chosen.hook_hosts),
            model=self.mllm if chosen.mllm else None,
        )
        made.runner = Runner(made)
        return made

    def attended(self, made: "Rooms") -> "Rooms":
        """The same rooms, with what works beside the requests begun: batches and webhooks."""
        from omnivideo.api import chat
        from omnivideo.api.batches import Lines
        from omnivideo.backends.batches import BatchRunner
        from omnivideo.backends.hooks import HookSender

        chosen, say = self.settings, partial(chat.say, made)
        runner = BatchRunner(made.records, self.jobs, self.store, self.tell, Lines(made), say, chosen.lost_after)
        sender = HookSender(made.records, chosen.hook_hosts)
        self.closing += [runner.start().stop, sender.start().stop]
        return made

    def attach(self, path: str | Path, made_by: str) -> Any:
        """A file of this machine's own user; what comes over the wire goes through backends.incoming."""
        return attached(self.store, path, made_by)

    def sweep(self) -> list[str]:
        """Removes what no thread, job or file refers to; returns the removed keys."""
        from omnivideo.storage.records import Records

        referred = (
            self.conversations.referred() | self.jobs.referred(self.settings.lifetime) | Records(self.engine).referred()
        )
        return self.store.sweep(referred, self.settings.lifetime)

    def close(self) -> None:
        """Ends what was begun, the newest first."""
        while self.closing:
            self.closing.pop()()


def make_home(home: Path) -> None:
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError:
        raise InvalidInput("OMNIVIDEO_HOME", "it cannot be made; give a folder that can be written") from None

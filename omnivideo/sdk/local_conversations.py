"""The conversations of the SDK's Studio, without a service."""

from functools import partial

from omnivideo.agent.conversations import Conversations
from omnivideo.backends.decoder.renderer import Renderer
from omnivideo.backends.queue.local import LocalQueue
from omnivideo.media.artifacts import StoreMediaTools, store_user_file
from omnivideo.models.omni import OmniVideoModel
from omnivideo.ports import TextLimits
from omnivideo.settings import ServiceSettings
from omnivideo.storage.checkpointer import open_checkpointer
from omnivideo.storage.objects.local import LocalObjectStore
from omnivideo.wiring import connect_mllm


def build_local_conversations(
    omni: OmniVideoModel, weights_digest: str, settings: ServiceSettings, text_limits: TextLimits
) -> Conversations:
    """Build the Studio's conversations: clips are rendered in this process while they are followed."""
    store = LocalObjectStore(settings.home / "store")
    # A job of this queue never leaves the process, so neither do its visual tokens.
    renderer = Renderer(omni, store, weights_digest, persist_tokens=False)
    queue = LocalQueue(renderer)
    return Conversations(
        mllm=connect_mllm(settings, store) or renderer.mllm,
        queue_for=lambda owner, lane="interactive": queue,
        store=store,
        checkpointer=open_checkpointer(settings),
        attach_file=partial(store_user_file, store),
        preset=omni.preset,
        open_media_tools=lambda owner: StoreMediaTools(store),
        max_generations=settings.max_generations_per_turn,
        text_limits=text_limits,
        replay_manifest=renderer.replay_manifest,
    )

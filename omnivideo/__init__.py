"""OmniVideo: understand, generate and edit video in one conversation.

    from omnivideo import Studio
    clip = Studio().generate("a small red circle moving right")
    clip.save("clip.mp4")

Importing this package loads no model library: each name below is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from omnivideo.cpu_threads import configure_cpu_threads
from omnivideo.startup import defer_imports, pause_collection

if TYPE_CHECKING:
    from omnivideo.sdk.async_client import AsyncClient
    from omnivideo.sdk.client import Client
    from omnivideo.sdk.result import Result
    from omnivideo.sdk.studio import Studio

__version__ = "0.2.0"
__all__ = ["AsyncClient", "Client", "Result", "Studio", "__version__"]
LAZY_EXPORTS = {
    "Studio": "sdk.studio",
    "Result": "sdk.result",
    "Client": "sdk.client",
    "AsyncClient": "sdk.async_client",
}


def __getattr__(name: str) -> Any:
    if name in LAZY_EXPORTS:
        if name == "Studio":  # its module loads torch
            configure_cpu_threads()
            defer_imports()
        with pause_collection():
            return getattr(import_module(f"omnivideo.{LAZY_EXPORTS[name]}"), name)
    raise AttributeError(f"module 'omnivideo' has no attribute {name!r}")

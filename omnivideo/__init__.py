"""OmniVideo: a service you talk to, that understands, creates and edits video.

    from omnivideo import Studio
    clip = Studio().generate("a small red circle moving right")
    clip.save("clip.mp4")

Importing this package loads no model library: `Studio` is fetched on first use.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omnivideo.studio import Result, Studio

__version__ = "0.1.0"
__all__ = ["Result", "Studio", "__version__"]


def __getattr__(name: str) -> Any:
    if name in ("Result", "Studio"):
        from omnivideo import studio

        return getattr(studio, name)
    raise AttributeError(f"module 'omnivideo' has no attribute {name!r}")

"""A thread of the planner over in-memory twins."""

from langgraph.checkpoint.memory import InMemorySaver

from omnivideo.agent.graph import Planner
from omnivideo.agent.thread import Thread
from omnivideo.contracts import Artifact
from omnivideo.presets import TINY
from omnivideo.turns import QuestionAsked, Turn, TurnCompleted
from tests.support.twins import InstantQueue, ScriptedMLLM


class Conversation:
    """A thread over twins; `events` are those of the last turn."""

    def __init__(self, saver=None, name="conversation", mllm=None, preset=TINY, media_tools=None):
        self.mllm, self.queue = mllm or ScriptedMLLM(), InstantQueue()
        planner = Planner(self.mllm, self.queue, preset, media_tools)
        self.graph = planner.build_graph(saver or InMemorySaver())
        self.thread = Thread(self.graph, name, attach)
        self.events: list = []
        if not self.thread.exists():
            self.thread.initialize_state()

    def say(self, text, **options) -> Turn | QuestionAsked:
        self.events = list(self.thread.send(text, **options))
        last = self.events[-1]
        return last.turn if isinstance(last, TurnCompleted) else last

    def list_events(self, kind):
        return [event for event in self.events if isinstance(event, kind)]


def attach(path, made_by):
    return Artifact(
        key=str(path), medium="image", width=64, height=64, frames=1, fps=1.0, caption=str(path), created_by=made_by
    )

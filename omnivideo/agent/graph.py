"""The planner: a turn of a conversation through think, route, understand | generate | edit, check.

    plan -> refer -> think -> route -> understand ------------> next act, or answer
                                    -> generate | edit -> check -> another try, next act, or answer

`refer` finds what the act is about, and asks back (interrupt) where that is not clear.
Each node is one step of the thread's checkpoint: a process that is killed goes on from the last one.  The planner
knows only ports; what happens is told as events while it happens.
"""

import hashlib
import time
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.config import get_config, get_stream_writer
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from omnivideo.agent import words
from omnivideo.agent.state import State
from omnivideo.contracts import (
    END_THINK,
    MOST_SEED,
    THINK,
    Act,
    Artifact,
    Ask,
    Done,
    Event,
    Finished,
    Given,
    Goal,
    Job,
    Made,
    Medium,
    Plan,
    Planned,
    Rewritten,
    Routed,
    Text,
    Thinking,
    Trace,
    Try,
    Turn,
    TurnOptions,
)
from omnivideo.ports import MLLM, JobQueue

SURE = 0.5  # below this probability the route is asked for
AGREED = 0.5  # from here on a try is taken as it is
NAMED: dict[Medium, str] = {"image": "picture", "video": "video"}
NOTHING_YET = "There is nothing here yet to change. What shall I draw?"
ROUTE_QUESTION = "I am not sure what you would like: a picture, a clip, or an answer in words?"


@dataclass(frozen=True)
class Prompts:
    """The instructions for the MLLM's modes.  A small model is trained for short ones of its own, and cannot plan: its
    turns are split, and their references found, by their (English) words."""

    think: str
    check: str
    describe: str
    plan: str | None = None


def prompts_for(preset: str) -> Prompts:
    folder = files("omnivideo.agent") / "prompts"
    folder = folder / preset if (folder / preset).is_dir() else folder
    names = ("think", "check", "describe", "plan")
    found = {name: folder / f"{name}.md" for name in names}
    return Prompts(**{name: path.read_text().strip() for name, path in found.items() if path.is_file()})


def tell(event: Event) -> None:
    get_stream_writer()(event)


def seed_from(*parts: object) -> int:
    """A seed that follows from what it is for."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") % (MOST_SEED + 1)


def split_thought(text: str) -> tuple[str, str]:
    """The reasoning and the rewrite of a think-mode answer; the rewrite is empty where the model did not get there."""
    before, mark, after = text.partition(END_THINK)
    return before.replace(THINK, "").strip(), after.strip() if mark else ""


@dataclass
class Finding:
    """The search for what an act is about: what there is, what the model saw on it, what had to be asked."""

    artifacts: list[Artifact]
    descriptions: dict[str, str]
    asked: list[tuple[str, str]]

    def ask(self, question: str) -> str:
        """Halts the turn until the user replies."""
        reply = str(interrupt(question))
        self.asked.append((question, reply))
        return reply


class Planner:
    """The nodes, over the ports that they need."""

    def __init__(self, mllm: MLLM, queue: JobQueue, prompts: Prompts):
        self.mllm = mllm
        self.queue = queue
        self.prompts = prompts

    def graph(self, saver: BaseCheckpointSaver) -> Any:
        build = StateGraph(State)
        for name in ("plan", "refer", "think", "route", "understand", "generate", "edit", "check", "answer"):
            build.add_node(name, getattr(self, name))
        build.add_edge(START, "plan")
        build.add_edge("plan", "refer")
        build.add_conditional_edges("refer", after_refer, ["think", "refer", "answer"])
        build.add_edge("think", "route")
        build.add_conditional_edges("route", goal_of, ["understand", "generate", "edit"])
        build.add_conditional_edges("understand", next_act, ["refer", "answer"])
        build.add_edge("generate", "check")
        build.add_edge("edit", "check")
        build.add_conditional_edges("check", after_check, ["generate", "edit", "refer", "answer"])
        build.add_edge("answer", END)
        return build.compile(checkpointer=saver)

    # ------------------------------------------------------------ the turn comes in

    def plan(self, state: State) -> dict[str, Any]:
        pieces, abouts = self.split(state)
        tell(Planned(plan=Plan(acts=tuple(Act(text=piece) for piece in pieces))))
        attached = state["attachments"]
        return {
            "pieces": pieces,
            "abouts": abouts,
            "at": 0,
            "asked": [],
            "done": [],
            "artifacts": attached,
            "current": attached[-1]["key"] if attached else state.get("current"),
            "descriptions": state.get("descriptions", {}),
        }

    def split(self, state: State) -> tuple[list[str], list[str]]:
        """The acts' words, and what each is about: by the model where it can plan and does so in form, else nothing."""
        if self.prompts.plan:
            made = [Artifact(**one) for one in state.get("artifacts", []) + state["attachments"]]
            ask = Ask(text=words.plan_request(state["text"], made), system=self.prompts.plan)
            if planned := words.planned("".join(self.mllm.write(ask)), len(made)):
                return [one.do for one in planned], [one.about for one in planned]
        pieces = words.acts(state["text"])
        return pieces, [""] * len(pieces)

    def refer(self, state: State) -> dict[str, Any]:
        """Which artifact the act is about; asks back where that is not clear."""
        finding = Finding([Artifact(**one) for one in state["artifacts"]], dict(state["descriptions"]), [])
        text = state["pieces"][state["at"]]
        if state["at"] == 0 and state["attachments"]:
            source: Artifact | None = finding.artifacts[-1]
        elif about := state["abouts"][state["at"]]:
            source = self.meant(about, finding)
        else:
            source = self.resolve(text, state["current"], finding)
        if source is None and not finding.artifacts and words.changes(text):
            # Nothing is there to change: the reply is what to begin with.
            text = finding.ask(NOTHING_YET)
        act = Act(text=text, source=None if source is None else source.key)
        begun = {
            "act": act.model_dump(), "trace": None, "statement": None, "tries": [], "over": False,
            "asked": state["asked"] + finding.asked, "descriptions": finding.descriptions,
        }  # fmt: skip
        if source is None or not words.goes_back(text):
            return begun
        tell(Made(artifact=source))
        routed = Routed(kind="text", probability=1.0)
        done = Done(act=act, goal="understand", routed=routed, trace=None, artifact=source)
        return begun | {"current": source.key} | closed(state, done)

    def meant(self, about: str, finding: Finding) -> Artifact | None:
        """What the model's plan says: "new", "last", "unclear", or the number of an artifact."""
        if about == "new" or not finding.artifacts:
            return None
        if about == "unclear":
            return self.which("", finding)
        return finding.artifacts[-1 if about == "last" else int(about) - 1]

    def resolve(self, text: str, current: str | None, finding: Finding) -> Artifact | None:
        artifacts = finding.artifacts
        if not artifacts:
            return None
        if named := words.by_number(text, artifacts):
            return named.artifact or self.which(f"There is no {named.words.removeprefix('the ')} here. ", finding)
        if described := words.looks(text):
            return self.by_looks(*described, finding)
        if words.points(text):
            return next((one for one in reversed(artifacts) if one.key == current), None)
        return None

    def by_looks(self, looks: str, medium: Medium | None, finding: Finding) -> Artifact:
        """The latest artifact that shows what the words say, by the model's own description of each."""
        for one in reversed(finding.artifacts):
            if medium in (None, one.medium) and words.fits(looks, self.description(one, finding)):
                return one
        return self.which(f"I find no {looks.strip()} here. ", finding)

    def which(self, why: str, finding: Finding) -> Artifact:
        """Asks which artifact is meant, twice at most; who names none then gets the last one."""
        descriptions = [self.description(one, finding) for one in finding.artifacts]
        question = why + words.which_one(finding.artifacts, descriptions)
        for _ in range(2):
            if found := words.chosen(finding.ask(question), finding.artifacts, descriptions):
                return found
        return finding.artifacts[-1]

    def description(self, artifact: Artifact, finding: Finding) -> str:
        if artifact.key not in finding.descriptions:
            ask = Ask(text=self.prompts.describe.format(medium=NAMED[artifact.medium]), shown=(artifact,))
            finding.descriptions[artifact.key] = "".join(self.mllm.write(ask)).strip()
        return finding.descriptions[artifact.key]

    # ------------------------------------------------------------ think and route

    def think(self, state: State) -> dict[str, Any]:
        """Think mode: the request rewritten by reasoning, before anything is drawn."""
        ask = self.ask(state)
        routed = self.mllm.route(ask)
        options = TurnOptions(**state["options"])
        wanted = options.think == "on" or (options.think == "auto" and words.is_indirect(ask.text))
        trace = None
        if wanted and routed.kind != "text":
            trace = self.thought(ask)
            tell(Rewritten(trace=trace))
        return {"routed": routed.model_dump(), "trace": trace and trace.model_dump()}

    def thought(self, ask: Ask) -> Trace:
        began, said = time.perf_counter(), ""
        for piece in self.mllm.write(ask.model_copy(update={"system": self.prompts.think})):
            said += piece
            if END_THINK not in said and (shown := piece.replace(THINK, "")):
                tell(Thinking(piece=shown))
        reasoning, rewrite = split_thought(said)
        seconds = round(time.perf_counter() - began, 3)
        return Trace(request=ask.text, reasoning=reasoning, rewrite=rewrite or ask.text, seconds=seconds)

    def route(self, state: State) -> dict[str, Any]:
        """By the model's own token; where that is a toss-up, the user is asked."""
        routed = Routed(**state["routed"])
        if routed.probability >= SURE:
            return {}
        reply = interrupt(ROUTE_QUESTION)
        kind: Literal["text", "image", "video"] = (
            "image" if any(word in reply.lower() for word in ("picture", "image", "photo", "still"))
            else "video" if any(word in reply.lower() for word in ("clip", "video", "animation", "movie")) else "text"
        )  # fmt: skip
        asked = [*state["asked"], (ROUTE_QUESTION, reply)]
        return {"routed": Routed(kind=kind, probability=1.0).model_dump(), "asked": asked}

    # ------------------------------------------------------------ the three goals

    def understand(self, state: State) -> dict[str, Any]:
        said = ""
        for piece in self.mllm.write(self.ask(state)):
            said += piece
            tell(Text(piece=piece))
        return closed(state, Done(**self.begun(state, "understand"), answer=said.strip()))

    def generate(self, state: State) -> dict[str, Any]:
        return self.drawn(state, None)

    def edit(self, state: State) -> dict[str, Any]:
        return self.drawn(state, self.source(state))

    def drawn(self, state: State, source: Artifact | None) -> dict[str, Any]:
        """One try: the vision head's tokens for the (rewritten) prompt, then a job with the next seed."""
        options, tries = TurnOptions(**state["options"]), list(state["tries"])
        number, at, attempt = len(state["turns"]) + 1, state["at"], len(tries)
        base = options.seed if options.seed is not None else seed_from(state["seed"], number, at)
        medium: Medium = source.medium if source else "image" if state["routed"]["kind"] == "image" else "video"
        prompt = self.prompt(state)
        # A turn that failed may be said again: its jobs are other jobs.
        again = f".{state['failures']}" if state.get("failures") else ""
        job = Job(
            id=f"{thread_id()}/{number}.{at + 1}.{attempt + 1}{again}",
            task=f"{medium}-editing" if source else f"text-to-{medium}",  # type: ignore[arg-type]
            prompt=prompt,
            visual_tokens=self.mllm.visual_tokens(Ask(text=prompt, shown=(source,) if source else ()), medium),
            source=source,
            seed=(base + attempt) % (MOST_SEED + 1),
            given=Given(steps=options.steps, guidance_scale=options.guidance_scale),
        )
        made = self.followed(job, final=options.check == 1)
        return {"tries": [*tries, Try(seed=job.seed, artifact=made).model_dump()]}

    def followed(self, job: Job, final: bool) -> Artifact:
        for event in self.queue.run(job):
            if isinstance(event, Artifact):
                tell(Made(artifact=event, final=final))
                return event
            tell(event)
        raise AssertionError("a job ends with an artifact")

    # ------------------------------------------------------------ check and answer

    def check(self, state: State) -> dict[str, Any]:
        """Inference-time scaling: the model's own understanding says whether a try shows what was asked for."""
        options = TurnOptions(**state["options"])
        tries = [Try(**one) for one in state["tries"]]
        if options.check == 1:
            return self.settled(state, tries)
        statement = state["statement"] or self.statement(state)
        question = self.prompts.check.format(prompt=statement)
        agreement = self.mllm.agreement(Ask(text=question, shown=(tries[-1].artifact,)))
        tries[-1] = tries[-1].model_copy(update={"agreement": round(agreement, 4)})
        if agreement < AGREED and len(tries) < options.check:
            return {"tries": [one.model_dump() for one in tries], "statement": statement}
        return self.settled(state, tries)

    def statement(self, state: State) -> str:
        """What the result should show.  An instruction says what to change, so it is restated first."""
        trace = state["trace"]
        if trace is None and state["act"]["source"]:
            trace = self.thought(self.ask(state)).model_dump()
        said = trace["rewrite"] if trace else state["act"]["text"]
        return said.removeprefix("picture of ").removeprefix("video of ")

    def settled(self, state: State, tries: list[Try]) -> dict[str, Any]:
        best = max(tries, key=lambda one: one.agreement or 0.0).artifact
        if len(tries) > 1 or tries[0].agreement is not None:
            tell(Made(artifact=best))
        goal: Goal = "edit" if best.source else "generate"
        done = Done(**self.begun(state, goal), tries=tuple(tries), artifact=best)
        kept = {"artifacts": [best.model_dump()], "current": best.key}
        return kept | {"tries": [one.model_dump() for one in tries]} | closed(state, done)

    def answer(self, state: State) -> dict[str, Any]:
        turn = Turn(
            number=len(state["turns"]) + 1,
            text=state["text"],
            attachments=tuple(Artifact(**one) for one in state["attachments"]),
            asked=tuple((question, reply) for question, reply in state["asked"]),
            done=tuple(Done(**one) for one in state["done"]),
        )
        tell(Finished(turn=turn))
        return {"turns": [turn.model_dump()]}

    # ------------------------------------------------------------ what several nodes need

    def source(self, state: State) -> Artifact | None:
        key = state["act"]["source"]
        return next((Artifact(**one) for one in reversed(state["artifacts"]) if one["key"] == key), None)

    def ask(self, state: State) -> Ask:
        source = self.source(state)
        return Ask(text=state["act"]["text"], shown=(source,) if source else ())

    def prompt(self, state: State) -> str:
        return state["trace"]["rewrite"] if state["trace"] else state["act"]["text"]

    def begun(self, state: State, goal: Goal) -> dict[str, Any]:
        return {"act": state["act"], "goal": goal, "routed": state["routed"], "trace": state["trace"]}


def thread_id() -> str:
    return str(get_config()["configurable"]["thread_id"])


def closed(state: State, done: Done) -> dict[str, Any]:
    return {"done": [*state["done"], done.model_dump()], "at": state["at"] + 1, "over": True}


def next_act(state: State) -> str:
    return "refer" if state["at"] < len(state["pieces"]) else "answer"


def after_refer(state: State) -> str:
    """An act that only went back to something is over already."""
    return next_act(state) if state["over"] else "think"


def goal_of(state: State) -> str:
    if state["routed"]["kind"] == "text":
        return "understand"
    return "edit" if state["act"]["source"] else "generate"


def after_check(state: State) -> str:
    """Another try while the act is not over."""
    return next_act(state) if state["over"] else goal_of(state)

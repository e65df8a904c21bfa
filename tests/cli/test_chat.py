"""The terminal chat in this process, with an untrained model; tests/usability has it in a real terminal."""

import io
import os
import signal

import pytest
from rich.console import Console
from rich.text import Text

from omnivideo.cli.chat import TerminalChat
from omnivideo.cli.turn_display import TurnDisplay, print_wrapped
from omnivideo.contracts import StepProgress
from omnivideo.media.read import measure_media
from omnivideo.sdk.studio import Studio
from omnivideo.turns import TextDelta

REQUEST = "a clip where a red ball goes left"


@pytest.fixture(scope="module")
def studio(weights, tmp_path_factory) -> Studio:
    return Studio(weights=weights, home=tmp_path_factory.mktemp("home"), device="cpu")


def open_chat(studio, thread=None, **options):
    output = io.StringIO()
    console = Console(file=output, width=80)
    return TerminalChat(studio, thread or studio.open_thread(), console, **({"steps": 1} | options)), output


def test_the_chat_continues_after_an_error(studio):
    chat, output = open_chat(studio)
    chat.run(["/nonsense", "/save", "/undo", "a red ball", "/history", "/fork 9", "/fork 0", "/history", "/quit", "no"])
    text = output.getvalue()
    assert "/nonsense is not one of" in text and "has no clip or image yet" in text and "no turn to take back" in text
    assert "a red ball" in text and "turn: 9 is not a turn of this thread" in text
    assert "after turn 0" in text


def test_a_message_saves_the_file_in_the_current_folder(studio, tmp_path, monkeypatch):
    """In the asked format; saved files are found over HTTP too, and kept while the thread refers to them."""
    monkeypatch.chdir(tmp_path)
    chat, output = open_chat(studio)
    thread = chat.thread
    chat.run([REQUEST, "save it as final.mp4", "as a GIF", "save it as x.webm", "/quit"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.gif", "final.mp4"]
    assert measure_media(tmp_path / "clip.gif").frames == measure_media(tmp_path / "final.mp4").frames == 9
    assert "saved final.mp4" in output.getvalue() and "cannot write webm" in output.getvalue()
    converted = thread.get_turns()[2].results[0].artifact
    assert converted.key.endswith(".gif") and thread.has_file(converted.key) and not thread.has_file("other.gif")
    assert converted.key in studio.conversations.collect_referenced_keys()


def test_what_was_made_of_other_results_is_saved_in_another_format(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat, output = open_chat(studio)
    chat.run([REQUEST, "a clip where a blue star goes up", "put the two clips together", "as a GIF"])
    assert measure_media(tmp_path / "clip.gif").frames == 18, output.getvalue()
    chat.run([f"/save {tmp_path / 'x.gif'}", "give me the last frame", f"/save {tmp_path / 'frame.gif'}"])
    assert measure_media(tmp_path / "x.gif").frames == 18, output.getvalue()
    assert measure_media(tmp_path / "frame.gif").frames == 1


def test_save_converts_and_takes_the_current_result(studio, tmp_path):
    """After an undo, that is the one from before; what cannot be written is refused with the allowed suffixes."""
    chat, output = open_chat(studio)
    chat.run([REQUEST, f"/save {tmp_path / 'x.gif'}", f"/save {tmp_path / 'x.mp4'}", f"/save {tmp_path / 'x.webm'}"])
    assert measure_media(tmp_path / "x.gif").frames == measure_media(tmp_path / "x.mp4").frames == 9
    assert "save: the file's name must end with .mp4 or .gif" in output.getvalue()
    chat.run(["a clip where a blue star goes up", "undo", f"/save {tmp_path / 'undone.mp4'}"])
    assert (tmp_path / "undone.mp4").read_bytes() == (tmp_path / "x.mp4").read_bytes()


def test_attached_files_may_have_spaces_and_line_breaks_are_kept(studio):
    chat, _ = open_chat(studio)
    sent = []
    chat.thread.send = lambda text, files, **options: sent.append((text, files)) or iter(())
    chat.run(['what is\nthis? @"my clips/one.mp4" @two.mp4', "mail to me@example.org"])
    assert sent == [("what is\nthis?", ["my clips/one.mp4", "two.mp4"]), ("mail to me@example.org", [])]


def test_paths_are_printed_whole(studio):
    """Also where they are longer than the terminal is wide, so that they can be copied."""
    chat, output = open_chat(studio)
    chat.run([REQUEST])
    path = studio.artifact_path(chat.thread.get_artifacts()[-1])
    assert len(str(path)) > 80 and str(path) in output.getvalue()


def test_a_terminal_wraps_answers_between_words():
    """Also where the parts of a streamed answer end within a word; a path longer than the line is not broken."""
    output = io.StringIO()
    display = TurnDisplay(Console(file=output, force_terminal=True, no_color=True, width=20), lambda artifact: "")
    for part in ("I can draw circ", "les, squares and tri", "angles\non grey. See ", "/" + "x" * 30):
        display.write(part)
    display.close()
    print_wrapped(display.console, Text("saved as /" + "y" * 30 + " for you"))
    assert [line.rstrip() for line in output.getvalue().splitlines()] == [
        *("I can draw circles,", "squares and", "triangles", "on grey. See /" + "x" * 30),
        *("saved as /" + "y" * 30, "for you"),
    ]


def test_a_save_without_a_name_keeps_the_files_that_are_there(studio, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.mp4").write_text("mine")
    chat, output = open_chat(studio)
    chat.run([REQUEST, "/save", "/save", "/save none/x.mp4"])
    assert (tmp_path / "clip.mp4").read_text() == "mine"
    assert (tmp_path / "clip-2.mp4").read_bytes() == (tmp_path / "clip-3.mp4").read_bytes()
    assert "save: 'none/x.mp4' cannot be written: there is no folder 'none'" in output.getvalue()


def test_threads_are_listed_with_their_first_message(studio):
    chat, output = open_chat(studio)
    other = studio.open_thread()
    chat.run(["hello [bold]there", "/threads"])
    assert f"* {chat.thread.get_changed_at()[:10]}" in output.getvalue()
    line = next(line for line in output.getvalue().splitlines() if line.startswith("*"))
    assert chat.thread.id in line and line.endswith("1 turn   hello [bold]there")
    assert other.id not in output.getvalue()


def test_an_answer_follows_the_bar_on_a_line_of_its_own():
    """The bar is gone before anything else is printed, so that it cannot erase it."""
    output = io.StringIO()
    display = TurnDisplay(Console(file=output, force_terminal=True, width=60), lambda artifact: artifact.key)
    display.show(TextDelta(delta="I begin."))
    display.show(StepProgress(step=1, steps=8, eta_seconds=1.0))
    assert display.bar is not None and display.bar.live.is_started
    display.show(TextDelta(delta="it is "))
    assert display.bar is None
    display.show(TextDelta(delta="blue"))
    display.close()
    text = output.getvalue()
    assert "I begin.\n" in text and text.endswith("it is blue\n")


def test_the_first_interrupt_cancels_the_turn_and_leaves_the_thread_as_it_was(studio):
    """The next message does not run the cancelled request."""
    chat, output = open_chat(studio, is_interactive=True, steps=12)
    chat.run(["hello"])
    send = chat.thread.send

    def interrupt_at_a_step(*args, **options):
        for event in send(*args, **options):
            if isinstance(event, StepProgress) and event.step == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield event

    chat.thread.send = interrupt_at_a_step
    handler = signal.getsignal(signal.SIGINT)
    chat.run([REQUEST])
    assert "cancelled; the thread is as it was" in output.getvalue()
    assert signal.getsignal(signal.SIGINT) is handler
    chat.thread.send = send
    assert [turn.text for turn in chat.thread.get_turns()] == ["hello"] and not chat.thread.has_unfinished_turn()
    chat.run(["hello again"])
    assert [turn.text for turn in chat.thread.get_turns()] == ["hello", "hello again"]
    assert chat.thread.get_artifacts() == []
    assert f"to continue: omnivideo chat --thread {chat.thread.id}" in output.getvalue()

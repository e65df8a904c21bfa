"""`animate` and `extend` of Studio, Client and AsyncClient, with weights whose preset declares these tasks."""

import io

import av
import pytest
from PIL import Image

from omnivideo.errors import InvalidInput
from omnivideo.manifests import FrameManifest, JoinManifest, parse_manifest
from omnivideo.settings import load_settings
from omnivideo.wiring import ServiceWiring
from tests.sdk.test_parity import KINDS, open_kind
from tests.support.api_server import run_api_server
from tests.support.continuations import declare_everywhere, make_frames
from tests.support.sound import encode_with_sound


@pytest.fixture(scope="module")
def declared():
    with declare_everywhere():
        yield


@pytest.fixture(scope="module")
def address(declared, weights, tmp_path_factory):
    settings = load_settings(home=tmp_path_factory.mktemp("service"), weights=str(weights))
    wiring = ServiceWiring(settings, "cpu")
    wiring.start_background_services(wiring.build_service_context())
    with run_api_server(wiring) as address:
        yield address


@pytest.fixture(scope="module", params=KINDS)
def sdk(request, address, weights, tmp_path_factory):
    with open_kind(request.param, address, weights, tmp_path_factory.mktemp("studio")) as sdk:
        yield sdk


@pytest.fixture(scope="module")
def first_results():
    """The results of the first kind, which the others must equal."""
    return {}


def check_same(first_results: dict, name: str, result) -> None:
    """Compare a file with those of the other kinds."""
    assert result.data == first_results.setdefault(name, result.data)


def test_a_picture_is_animated(sdk, first_results):
    result = sdk.animate(Image.fromarray(make_frames(1)[0]), "it moves right", steps=1, seed=2)
    assert (result.manifest.task, result.frames.shape, result.seed) == ("image-to-video", (9, 64, 64, 3), 2)
    check_same(first_results, "animated", result)


def test_a_clip_ends_with_a_picture(sdk, first_results):
    first, last = make_frames(1)[0], make_frames(1, seed=1)[0]
    result = sdk.animate(first, "from one to the other", last_image=last, steps=1)
    assert result.manifest.task == "keyframes-to-video" and result.manifest.last_frame
    check_same(first_results, "keyframes", result)


def test_a_result_is_extended_and_extended_again(sdk, first_results):
    clip = sdk.extend(make_frames(9), "it goes on", steps=1, progress=False)
    assert (clip.frames.shape[0], clip.manifest.delivered.frames, clip.fps) == (17, 17, 8)
    steps = []
    longer = sdk.extend(clip, "it goes on", seconds=2, steps=1, on_step=steps.append)
    assert len(longer.frames) == 33 and longer.manifest.settings.passes == 2 and steps[-1].step == steps[-1].steps
    check_same(first_results, "extended", clip)


def test_an_extended_clip_keeps_its_sound(sdk, tmp_path):
    """Also in the file that is extended again."""
    (tmp_path / "a.mp4").write_bytes(encode_with_sound("mp4", "libx264", "aac", 2))
    longer = sdk.extend(sdk.extend(tmp_path / "a.mp4", "on", steps=1), "on", steps=1)
    written = parse_manifest(longer.save(tmp_path / "b.mp4").with_name("b.mp4.json").read_bytes())
    for data in (longer.data, (tmp_path / "b.mp4").read_bytes()):
        with av.open(io.BytesIO(data)) as container:
            seconds = [float(stream.duration * stream.time_base) for stream in container.streams]
        assert seconds == pytest.approx([4, 2], abs=0.05) and written.sound == "kept"


@pytest.mark.parametrize(("method", "source", "options", "field", "message"), [
    ("animate", make_frames(9), {}, "source", "it is a clip"),
    ("animate", make_frames(1)[0], {"last_image": make_frames(9)}, "last_image", "it is a clip"),
    ("animate", make_frames(1)[0], {"frames": 99}, "frames", "2 to 9"),
    ("extend", make_frames(1)[0], {}, "source", "it is a picture"),
    ("extend", make_frames(5), {}, "source", "it has 5 frames; this model continues clips of 9 or more"),
    ("extend", make_frames(9), {"seconds": 100}, "seconds", "800 frames would be added"),
])  # fmt: skip
def test_what_is_not_possible_is_refused_by_name(sdk, method, source, options, field, message):
    with pytest.raises(InvalidInput, match=message) as refused:
        getattr(sdk, method)(source, "on", steps=1, **options)
    assert refused.value.field == field


def test_a_picture_becomes_a_longer_and_longer_clip_in_a_thread(sdk):
    """The words of a turn lead to the tasks that the preset declares."""
    thread = sdk.open_thread()
    still = Image.fromarray(make_frames(1)[0])
    list(thread.send("animate it: the circle should move right", [still], steps=1))
    list(thread.send("make it longer", steps=1))
    list(thread.send("continue it", steps=1))
    frames = [artifact.frames for artifact in thread.get_artifacts()]
    assert frames == [1, 9, 17, 25]
    tasks = [thread.fetch_artifact(artifact).manifest.task for artifact in thread.get_artifacts()[1:]]
    assert tasks == ["image-to-video", "video-extension", "video-extension"]
    list(thread.send("put the two clips together", check=2))
    list(thread.send("add two more seconds", steps=1))
    list(thread.send("give me another variation", steps=1))
    _, joined, longer, other = thread.get_artifacts()[-4:]
    assert (joined.frames, longer.frames, other.frames) == (42, 58, 58) and longer.source == other.source == joined.key
    assert longer.key != other.key and len(thread.fetch_artifact(joined).frames) == 42


def test_what_is_made_of_other_results_has_a_manifest(sdk, tmp_path):
    """A joined clip and a frame name their parts, which can be fetched; they have no seed of their own."""
    thread = sdk.open_thread()
    list(thread.send("put the two clips together", [make_frames(9), make_frames(5, seed=1)]))
    list(thread.send("give me the last frame"))
    *clips, joined, frame = thread.get_artifacts()
    result, still = thread.fetch_artifact(joined), thread.fetch_artifact(frame)
    assert isinstance(result.manifest, JoinManifest) and isinstance(still.manifest, FrameManifest)
    assert (list(result.manifest.parts), list(still.manifest.parts)) == (clips, [joined])
    assert [len(thread.fetch_artifact(part).frames) for part in result.manifest.parts] == [9, 5]
    assert result.fps == 8 and result.prompt == joined.caption and "14 frames at 8 fps, joined" in repr(result)
    with pytest.raises(InvalidInput, match="seed: this was made of other results"):
        _ = result.seed
    for name, saved in (("a.mp4", result), ("a.gif", result), ("a.png", still)):
        written = parse_manifest((saved.save(tmp_path / name)).with_name(f"{name}.json").read_bytes())
        assert written == saved.manifest, name
    list(thread.send("as a gif"))

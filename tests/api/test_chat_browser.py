"""A real browser shows what the chat answers: every clip and picture, without a key."""

from tests.support.browser import measure_markdown


def test_a_browser_shows_clips_and_pictures(client, tmp_path):
    messages: list[dict] = []
    for text in ("a red ball moving right; a picture of a blue ball", "make it green", "how many [balls] are there?"):
        messages.append({"role": "user", "content": text})
        completion = client.chat.completions.create(model="tiny", messages=messages, seed=1, extra_body={"steps": 1})
        messages.append({"role": "assistant", "content": completion.choices[0].message.content})
    page = measure_markdown("\n\n".join(m["content"] for m in messages if m["role"] == "assistant"), tmp_path)
    assert [alt for alt, _, _ in page["pictures"]] == [
        "a red ball moving right",
        "a picture of a blue ball",
        "make it green",
    ]
    assert all(width > 0 and height > 0 for _, width, height in page["pictures"]), page["pictures"]
    assert len(page["links"]) == 1 and ".mp4?owner=admin&" in page["links"][0]
    assert "Here is the clip: a red ball moving right" in page["text"]


def test_the_old_markup_showed_nothing(client, tmp_path):
    """The measure can fail: a clip's address is no picture."""
    completion = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "a red ball moving right"}], extra_body={"steps": 1}
    )
    clip = completion.choices[0].message.content.rpartition("<")[2].removesuffix(">")
    assert measure_markdown(f"![video]({clip})", tmp_path)["pictures"] == [["video", 0, 0]]

"""Attacks through names: of files, of ids, and of the fields of a form."""

import re

import pytest


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "..\\..\\boot.ini", "/etc/passwd", "a/../../b.png", "....//x", "C:\\x\\a.png", ".."]
)
def test_traversal_in_a_file_name(http, context, name):
    before = {path for path in context.settings.home.parent.rglob("*") if path.is_file()}
    stored = http.post("/v1/files", files={"file": (name, b"text")}, data={"purpose": "user_data"}).json()
    assert not set(stored["filename"]) & set("/\\")
    record = context.files.get_file(stored["id"], "admin")
    assert re.fullmatch(r"[0-9a-f]{64}\.bin", record.object_key) and context.store.get(record.object_key) == b"text"
    new_files = {path for path in context.settings.home.parent.rglob("*") if path.is_file()} - before
    assert all(path.is_relative_to(context.settings.home) for path in new_files)


@pytest.mark.parametrize("name", ["../../../etc/passwd", "..%2f..%2fetc%2fpasswd", "a" * 300, "%00", "a%0d%0ab"])
@pytest.mark.parametrize("path", ["/v1/files/{}/content", "/v1/videos/{}/content", "/v1/images/{}/content"])
def test_traversal_in_an_id(http, path, name):
    assert http.get(path.format(name)).status_code in (400, 404)


@pytest.mark.parametrize(
    "name", ['a"\r\nX-Evil: 1\r\n\r\n<b>', "a\nb", 'a"; filename="b.exe', "ä\u202egnp.exe", "\x00\x1b[2J", ";;"]
)
def test_header_injection_through_a_file_name(http, name):
    files = {"file": (name, b"text")}
    stored = http.post("/v1/files", files=files, data={"purpose": "user_data"}).json()
    assert stored["filename"].isprintable()
    answer = http.get(f"/v1/files/{stored['id']}/content")
    assert answer.content == b"text" and "x-evil" not in answer.headers
    assert re.fullmatch(r"attachment; filename\*=UTF-8''[\w.%~-]+", answer.headers["content-disposition"])


@pytest.mark.parametrize("field", ["filename", "name"])
def test_header_injection_in_a_raw_form(http, field):
    """The form is written by hand, with line ends inside its headers, because client libraries escape them."""
    parameters = {"filename": 'name="file"; filename="a\r\nContent-Type: text/html\r\n"', "name": 'name="fi\r\nle"'}[
        field
    ]
    parts = [f"--b\r\nContent-Disposition: form-data; {parameters}\r\n\r\ntext\r\n"]
    parts += ['--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nuser_data\r\n--b--\r\n']
    body = "".join(parts)
    answer = http.post("/v1/files", content=body.encode(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert answer.status_code in (200, 400)
    if answer.status_code == 200:
        assert (
            http.get(f"/v1/files/{answer.json()['id']}/content").headers["content-type"] == "application/octet-stream"
        )


def test_an_uploaded_page_is_not_served_as_html(http):
    for name, data in (("a.html", b"<script>alert(1)</script>"), ("a.svg", b"<svg onload='alert(1)'/>")):
        stored = http.post("/v1/files", files={"file": (name, data, "text/html")}, data={"purpose": "user_data"}).json()
        headers = http.get(f"/v1/files/{stored['id']}/content").headers
        assert headers["content-type"] == "application/octet-stream" and headers["x-content-type-options"] == "nosniff"

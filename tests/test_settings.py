"""Settings come from the environment: one name each, and a name of version 0.1 is refused."""

import re
from pathlib import Path

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.settings import OTHER_VARIABLES, RENAMED_SETTINGS, SECRET_SETTINGS, ServiceSettings, load_settings

ROOT = Path(__file__).parents[1]
# Where programs other than the service read variables.
SCRIPTS = ["Makefile", "tests/**/*.py", "benchmarks/**/*.py", "benchmarks/*.sh", "deploy/*.sh", ".github/**/*.yml"]
READS = re.compile(r"""(?:environ(?:\.get)?|getenv)[\[(]["'](OMNIVIDEO_[A-Z0-9_]+)|\$\{?(OMNIVIDEO_[A-Z0-9_]+)""")


@pytest.mark.parametrize(("old_name", "new_name"), RENAMED_SETTINGS.items())
def test_a_setting_of_version_0_1_is_refused_with_its_new_name(monkeypatch, old_name, new_name):
    monkeypatch.setenv(old_name, "1")
    with pytest.raises(InvalidInput, match=f"{old_name}: it has been called {new_name} since version 0.2"):
        load_settings()


def test_every_new_name_is_a_setting():
    fields = {f"OMNIVIDEO_{name.upper()}" for name in ServiceSettings.model_fields}
    assert set(RENAMED_SETTINGS.values()) <= fields
    assert not set(RENAMED_SETTINGS) & fields


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("OMNIVIDEO_HOEM", "did you mean OMNIVIDEO_HOME?"),
        ("OMNIVIDEO_S3_SECRETKEY", "did you mean OMNIVIDEO_S3_SECRET_KEY?"),
        ("omnivideo_database_url", "did you mean OMNIVIDEO_DATABASE?"),
        ("OMNIVIDEO_QQQQ", "unset it; deploy/.env.example lists all settings"),
    ],
)
def test_a_misspelt_setting_is_refused_with_the_nearest_name(monkeypatch, name, message):
    monkeypatch.setenv(name, "1")
    with pytest.raises(InvalidInput) as raised:
        load_settings()
    assert str(raised.value) == f"{name}: there is no such setting; {message}"


@pytest.mark.parametrize("name", SECRET_SETTINGS)
def test_a_secret_comes_from_a_file_which_precedes_its_variable(monkeypatch, tmp_path, name):
    values = {"database": "postgresql://user:word@db/omnivideo", "broker": "redis://:word@broker"}
    value, path = values.get(name, "a secret of a file"), tmp_path / "secret"
    path.write_text(f"{value}\n")
    monkeypatch.setenv(f"OMNIVIDEO_{name.upper()}", "in-a-file")
    monkeypatch.setenv(f"OMNIVIDEO_{name.upper()}_FILE", str(path))
    assert getattr(load_settings(), name) == value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "the file cannot be read; give the path of a text file"),
        (b"", "the file must hold the secret in one line, and nothing else"),
        (b"one line\nand another\n", "the file must hold the secret in one line, and nothing else"),
        (b"\xff\xfe", "the file cannot be read; give the path of a text file"),
    ],
)
def test_a_file_without_a_secret_is_refused_by_the_variables_name(monkeypatch, tmp_path, content, message):
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("OMNIVIDEO_ADMIN_KEY_FILE", str(path))
    with pytest.raises(InvalidInput) as raised:
        load_settings()
    assert str(raised.value) == f"OMNIVIDEO_ADMIN_KEY_FILE: {message}"


def test_variables_of_tests_and_of_kubernetes_are_accepted(monkeypatch):
    kubernetes = ["SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_HTTP", "PORT", "PORT_80_TCP", "PORT_80_TCP_ADDR"]
    for name in [*OTHER_VARIABLES, *(f"OMNIVIDEO_API_{suffix}" for suffix in kubernetes)]:
        monkeypatch.setenv(name, "1")
    load_settings()


def test_every_variable_that_a_script_reads_is_declared():
    read = {
        name
        for pattern in SCRIPTS
        for path in ROOT.glob(pattern)
        for match in READS.findall(path.read_text())
        for name in match
        if name
    }
    settings = {f"OMNIVIDEO_{name.upper()}" for name in ServiceSettings.model_fields}
    assert "OMNIVIDEO_GOLDEN" in read and read <= settings | OTHER_VARIABLES, read - settings - OTHER_VARIABLES

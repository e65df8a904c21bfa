"""Settings come from the environment: one name each, and a name of version 0.1 is refused."""

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.settings import RENAMED_SETTINGS, ServiceSettings, load_settings


@pytest.mark.parametrize(("old_name", "new_name"), RENAMED_SETTINGS.items())
def test_a_setting_of_version_0_1_is_refused_with_its_new_name(monkeypatch, old_name, new_name):
    monkeypatch.setenv(old_name, "1")
    with pytest.raises(InvalidInput, match=f"{old_name}: it has been called {new_name} since version 0.2"):
        load_settings()


def test_every_new_name_is_a_setting():
    fields = {f"OMNIVIDEO_{name.upper()}" for name in ServiceSettings.model_fields}
    assert set(RENAMED_SETTINGS.values()) <= fields
    assert not set(RENAMED_SETTINGS) & fields

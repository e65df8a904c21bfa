"""The README's conversation in Gradio's page, unmodified, in a browser: every clip is visible and moves."""

import pytest

from tests.support.browser import chromium
from tests.support.client_programs import CLIENTS, NotInstallable
from tests.support.client_runs import check_client
from tests.support.client_services import run_embedded_service

(GRADIO,) = (client for client in CLIENTS if client.title == "Gradio")


@pytest.mark.timeout(900)  # the first run installs the environment
def test_gradios_page_holds_the_conversation(tmp_path):
    chromium()
    try:
        GRADIO.install()
    except NotInstallable as error:
        pytest.skip(f"Gradio: {error}")
    with run_embedded_service(tmp_path) as service:
        result = check_client(GRADIO, service, tmp_path)
    assert {"streaming", "regenerate", "stop", "picture", "over-long text"} <= {
        feature for feature, word in result.items() if word == "worked"
    }

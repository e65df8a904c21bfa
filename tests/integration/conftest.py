"""A service over an untrained model, one for each file of tests that asks for it, and who speaks to it."""

import pytest

from tests.integration.openai_service import client_for, http_for, service_in
from tests.integration.vllm_server import interpreter


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """An interpreter that has vLLM."""
    try:
        return interpreter()
    except LookupError as why:
        pytest.skip(str(why))


@pytest.fixture(scope="module")
def service(omni, tmp_path_factory):
    with service_in(tmp_path_factory.mktemp("service"), omni) as made:
        yield made


@pytest.fixture(scope="module")
def rooms(service):
    return service[1]


@pytest.fixture(scope="module")
def client(service):
    """The unmodified openai client."""
    with client_for(service) as client:
        yield client


@pytest.fixture(scope="module")
def http(service):
    """For what the openai client has no words for."""
    with http_for(service) as http:
        yield http

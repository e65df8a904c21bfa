"""Unmodified clients, each in an environment of its own, hold the README's conversation with two services.

The run writes results.json and the table in docs/service.md, for the clients that it ran.
"""

import pytest

from tests.support.client_programs import CLIENTS, NotInstallable
from tests.support.client_runs import check_client
from tests.support.client_services import SERVICES
from tests.support.client_table import record_result, write_table


@pytest.fixture(scope="module", params=SERVICES)
def service(request, tmp_path_factory):
    with SERVICES[request.param](tmp_path_factory.mktemp(request.param)) as service:
        yield service


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    write_table()


@pytest.mark.timeout(4800)  # the first run installs the environments
@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_works(service, client, tmp_path):
    try:
        client.install()
    except NotInstallable as error:
        record_result(client, service.name, {"skipped": str(error)})
        pytest.skip(f"{client.title}: {error}")
    record_result(client, service.name, check_client(client, service, tmp_path))

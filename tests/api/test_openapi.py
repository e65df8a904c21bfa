"""The service conforms to its OpenAPI document: no 5xx, and no answer that is not documented."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from tests.support.api_server import build_scripted_wiring, run_api_server

KEY = "a-key-for-the-tests"
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(omni, tmp_path_factory):
    with run_api_server(build_scripted_wiring(tmp_path_factory.mktemp("service"), omni, admin_key=KEY)) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})


@pytest.mark.filterwarnings("ignore")
def test_a_few_requests_of_each_route_conform(document):
    check_operations(document, max_examples=3)


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_many_requests_of_each_route_conform(document):
    check_operations(document, max_examples=25)


def check_operations(document, max_examples):
    """Send generated requests to every operation of the document, and check the answers."""
    operation_count, failures = 0, []
    for result in document.get_all_operations():
        operation = result.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=max_examples, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))  # fmt: skip
        def check_operation(case):
            # The timeout is long because the machine may be busy with other tests.
            case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {KEY}"}, timeout=300)

        try:
            check_operation()
        except (Exception, BaseExceptionGroup) as error:
            failures.append(f"{operation.label}: {error}")
        operation_count += 1
    assert operation_count > 30
    assert not failures, "\n\n".join(failures)

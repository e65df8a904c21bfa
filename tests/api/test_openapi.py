"""Our OpenAPI document against the service itself: no 5xx, and no answer that the document does not have."""

import os

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import checks

from tests.support.api_server import scripted, serving

EXAMPLES = int(os.environ.get("OMNIVIDEO_EXAMPLES", "8"))  # a route
KEY = "a-key-for-the-tests"
CHECKS = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def document(omni, tmp_path_factory):
    with serving(scripted(tmp_path_factory.mktemp("service"), omni, admin_key=KEY)) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_the_document_is_kept(document):
    seen, wrong = 0, []
    for found in document.get_all_operations():
        operation = found.ok()

        @given(case=operation.as_strategy())
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
                  suppress_health_check=list(HealthCheck), phases=(Phase.explicit, Phase.generate))  # fmt: skip
        def kept(case):
            case.call_and_validate(
                checks=CHECKS, headers={"Authorization": f"Bearer {KEY}"}, timeout=300
            )  # a busy machine takes its time

        try:
            kept()
        except (Exception, BaseExceptionGroup) as error:
            wrong.append(f"{operation.label}: {error}")
        seen += 1
    assert seen > 30
    assert not wrong, "\n\n".join(wrong)

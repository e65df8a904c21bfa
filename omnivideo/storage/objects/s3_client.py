"""Connect to an S3 server, with timeouts and retries, and translate its failures into one-line errors."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import urllib3
from minio import Minio
from minio.error import MinioException
from urllib3.exceptions import HTTPError, NewConnectionError, SSLError, TimeoutError

from omnivideo.errors import ArtifactNotFound, InvalidInput, StoreError
from omnivideo.network import CERTIFICATE_ADVICE, create_tls_context, find_certificate_problem, find_proxy

# A request fails after 3 s if the server is down, after 11 s if its packets are lost, and after 45 s if it hangs.
HTTP_TIMEOUT = urllib3.Timeout(connect=2, read=20)
RETRY_POLICY = urllib3.Retry(
    total=3, read=1, backoff_factor=0.5, status_forcelist=(500, 502, 503, 504), allowed_methods=None
)
ACCESS_REFUSED_MESSAGE = "it rejects this access key, its secret key, or its permissions"
KEYS_ADVICE = "set OMNIVIDEO_S3_ACCESS_KEY and OMNIVIDEO_S3_SECRET_KEY to a pair that it knows"
ERROR_MESSAGES = {
    "AccessDenied": f"{ACCESS_REFUSED_MESSAGE}; {KEYS_ADVICE}, which may list, get, put and delete",
    "InvalidAccessKeyId": f"{ACCESS_REFUSED_MESSAGE}; {KEYS_ADVICE}",
    "SignatureDoesNotMatch": f"{ACCESS_REFUSED_MESSAGE}; {KEYS_ADVICE}",
    "RequestTimeTooSkewed": "its clock and this machine's are too far apart",
    "InvalidBucketName": "it allows no bucket of this name; set OMNIVIDEO_S3_BUCKET to another",
    "TooManyBuckets": "it allows no more buckets; set OMNIVIDEO_S3_BUCKET to one that exists",
    "PermanentRedirect": "the bucket has another address; set OMNIVIDEO_S3 to that of its region",
}
REGION_CODES = (
    "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "InvalidLocationConstraint", "InvalidRegion",
)  # fmt: skip
# How servers say which region they want: AWS, MinIO and others; Garage; a response to HEAD, which has no body.
WANTED_REGION = re.compile(r"expecting '([\w-]+)'|expected: \S*/([\w-]+)/s3/aws4_request|; use region ([\w-]+)")
WANTED_ENDPOINT = re.compile(r"<Endpoint>([\w.:-]+)</Endpoint>")


def create_s3_client(address: str, access_key: str, secret_key: str, region: str) -> Minio:
    """Return a client of `http://host:port` or `https://host:port`, without connecting.

    Raises InvalidInput for any other form of address.
    """
    url = urlsplit(address)
    if url.scheme not in ("http", "https") or not url.hostname or "@" in url.netloc or url.path.strip("/") or url.query:
        raise InvalidInput("S3 address", "http://host:port or https://host:port, without user, password and path")
    options: dict[str, Any] = {"maxsize": 16, "timeout": HTTP_TIMEOUT, "retries": RETRY_POLICY}
    options["ssl_context"] = create_tls_context()
    proxy = find_proxy(address)
    pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    secure = url.scheme == "https"
    return Minio(url.netloc, access_key, secret_key, secure=secure, region=region, http_client=pool)


def get_error_code(error: MinioException) -> str:
    """Return S3's error code. If a server labels its XML as text/xml, the client passes it on as text only."""
    match = re.search(r"<Code>(\w+)</Code>", str(error))
    return getattr(error, "code", None) or (match[1] if match else "something that is not S3")


def describe_answer(error: MinioException) -> str | None:
    """Return what a server's answer means, with the setting that would mend it and its value, or None."""
    code, text = get_error_code(error), str(error)
    wanted = WANTED_REGION.search(text)
    if code in REGION_CODES or (wanted and "; use region " in text):
        value = next(filter(None, wanted.groups())) if wanted else "its own"
        return f"it does not accept this region; set OMNIVIDEO_S3_REGION to {value}"
    if code == "PermanentRedirect" and (endpoint := WANTED_ENDPOINT.search(read_body(error))):
        return f"the bucket has another address; set OMNIVIDEO_S3 to https://{endpoint[1]}"
    return ERROR_MESSAGES.get(code)


def read_body(error: MinioException) -> str:
    response = getattr(error, "response", None)
    return (response.data or b"").decode(errors="replace") if response is not None else ""


@contextmanager
def translate_errors(address: str, key: str = "", fallback_message: str = "it answers {code}") -> Iterator[None]:
    """Raise the client's failures as our own errors, whose text contains no secret and no signed URL."""
    server = f"store: the S3 server at {urlsplit(address).netloc}: "
    try:
        yield
    except MinioException as error:
        code = get_error_code(error)
        if code in ("NoSuchKey", "NoSuchBucket", "NoSuchUpload"):
            raise ArtifactNotFound("store: there is no such artifact; it may have expired") from None
        if code == "InvalidRange":
            raise InvalidInput("range", "within the artifact") from None
        raise StoreError(server + (describe_answer(error) or fallback_message.format(code=code))) from None
    except HTTPError as error:
        raise StoreError(server + describe_http_error(error)) from None


def describe_http_error(error: HTTPError) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, NewConnectionError):
        return "no connection"
    if isinstance(reason, TimeoutError):
        return "no response in time"
    if problem := find_certificate_problem(reason):
        return f"its certificate is not trusted ({problem}); {CERTIFICATE_ADVICE}"
    if isinstance(reason, SSLError):
        return "it does not speak TLS; set OMNIVIDEO_S3 to an address that begins with http://"
    return "it failed, or the connection was lost"

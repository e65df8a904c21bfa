"""URLs that are refused before any connection."""

import pytest

from omnivideo.errors import InvalidInput
from omnivideo.media import fetch
from omnivideo.media.ingest import fetch_media

HOSTS = ("media.test", ".cdn.test")
UNREACHED = "url: the host cannot be reached; allowed: a public address that responds"


def fetch_refusal(url: str, allowed=HOSTS, **options: object) -> str:
    with pytest.raises(InvalidInput) as caught:
        fetch_media(url, allowed, 1000, 2, **options)
    assert caught.value.field == "url" and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def offline(monkeypatch):
    """Fail the test if a connection is attempted."""

    def tried(*_: object) -> None:
        pytest.fail("a connection was tried")

    monkeypatch.setattr(fetch.httpcore2.SyncBackend, "connect_tcp", tried)


INNER = """127.0.0.1 127.8.8.8 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200
    192.0.0.192 192.0.2.1 198.18.0.1 192.88.99.1 224.0.0.1 240.0.0.1 255.255.255.255 168.63.129.16
    :: ::1 ::ffff:10.0.0.1 ::ffff:8.8.8.8 ::10.0.0.1 64:ff9b::a00:1 64:ff9b::808:808 64:ff9b:1::1 2002:a00:1::1
    2001:0:4136:e378:8000:63bf:3fff:fdd2 2001:db8::1 fc00::1 fd00:ec2::254 fe80::1 fe80::1%eth0 fec0::1 ff02::1
    3fff::1 100::1"""


@pytest.mark.parametrize("address", INNER.split())
def test_attack_ssrf_by_name(address, offline):
    assert fetch_refusal("https://media.test/a.png", resolve=lambda host: [address]) == UNREACHED


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"])
def test_public_addresses_are_accepted(address):
    assert fetch.is_public_address(fetch.ipaddress.ip_address(address))


def test_attack_ssrf_by_one_address_among_public_ones(offline):
    assert fetch_refusal("http://media.test/", resolve=lambda host: ["8.8.8.8", "10.0.0.1", "1.1.1.1"]) == UNREACHED


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "127.1", "2130706433", "0x7f000001", "0x7f.1", "0177.0.0.1", "017700000001", "0", "[::1]",
     "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", "[0:0:0:0:0:ffff:a00:1]", "169.254.169.254", "localhost"],
)  # fmt: skip
def test_attack_ssrf_by_a_number_even_if_it_is_allowed(host, offline):
    assert "host that media may not be fetched from" in fetch_refusal(f"http://{host}/a.png")
    assert fetch_refusal(f"http://{host}/a.png", allowed=[host.strip("[]")]) == UNREACHED


@pytest.mark.parametrize("failure", [OSError("no such name: 10.1.2.3"), UnicodeError("label too long")])
def test_attack_port_scan_a_refused_address_gives_the_error_of_a_missing_host(failure):
    def resolve(host: str) -> list[str]:
        raise failure

    assert fetch_refusal("http://media.test/", resolve=resolve) == UNREACHED
    assert fetch_refusal("http://media.test/", resolve=lambda host: []) == UNREACHED


@pytest.mark.parametrize(
    "url",
    ["http://evil.test/", "http://media.test.evil.test/", "http://xmedia.test/", "http://xcdn.test/", "http:///a.png",
     "http://media.test./", "http://evil.test#media.test", "http://evil.test?media.test", "http://[::1%25media.test]/",
     "http://evil.test/media.test", "http://media%2etest/", "http://a..cdn.test/", "http://.cdn.test/"],
)  # fmt: skip
def test_attack_host_that_only_looks_allowed(url, offline):
    assert "host that media may not be fetched from" in fetch_refusal(url)


@pytest.mark.parametrize(
    "url", ["http://user:password@media.test/", "http://media.test@evil.test/", "http://@media.test/"]
)
def test_attack_userinfo(url, offline):
    text = fetch_refusal(url)
    assert "user name or a password; allowed: none" in text and "password@" not in text


@pytest.mark.parametrize(
    "url",
    ["http://media.test\\@evil.test/", "http://media.test/ HTTP/1.1\r\nX: y", "http://media.test/\tx", " http://media.test",
     "http://media.test/\0", "http://m\u00e9dia.test/", "http://media\u3002test/", "http://[media.test/",
     "http://media.test:99999/", "http://media.test:x/", "", "http://media.test/" + "a" * 5000],
)  # fmt: skip
def test_attack_url_that_parsers_read_differently(url, offline):
    assert "is not a URL; allowed: " in fetch_refusal(url)


@pytest.mark.parametrize("scheme", ["file", "ftp", "gopher", "javascript", "data", "unix", "httpx", ""])
def test_attack_scheme(scheme, offline):
    assert "has another scheme; allowed: http, https" in fetch_refusal(f"{scheme}://media.test/etc/passwd")


@pytest.mark.parametrize("url", ["http://media.test:22/", "https://media.test:80/", "http://media.test:0/"])
def test_attack_port(url, offline):
    assert "names another port; allowed: " in fetch_refusal(url)


def test_fetching_is_disabled_without_allowed_hosts(offline):
    assert fetch_refusal("http://media.test/", allowed=()) == (
        "url: fetching by URL is disabled; allowed: an upload, or a data: URL"
    )


@pytest.mark.parametrize("host", ["MEDIA.test", "cdn.test", "a.cdn.test", "a.b.cdn.test"])
def test_an_allowed_host_is_accepted(host):
    asked: list[str] = []
    assert fetch_refusal(f"https://{host}/", resolve=lambda name: asked.append(name) or []) == UNREACHED
    assert asked == [host.lower()]

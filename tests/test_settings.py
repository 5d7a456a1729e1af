"""The settings: defaults, valid and invalid values, and the messages about them."""

import os
import tempfile
from ipaddress import ip_network
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError
from redis.asyncio.connection import parse_url

from oncegate.settings.addresses import Address, Origin
from oncegate.settings.contradictions import CONTRADICTIONS
from oncegate.settings.errors import SettingsError
from oncegate.settings.groups.access import UserRole
from oncegate.settings.loading import describe, load_settings, table
from oncegate.settings.settings import Settings
from oncegate.settings.store_url import parse_server_group
from oncegate.testing.faults import Fault

CANARY = "hunter2-the-canary"
UPSTREAM = "http://upstream:9000"
FAULTS = (Fault("kill", "claimed", 1, 0), Fault("pause", "sent", 2, 300))
PEM = Path("file.pem")  # in the working directory, which is a fresh one for each test

# name: default; an override and what it becomes; a bad value and a part of its message
CASES: dict[str, tuple[object, str, object, str, str]] = {
    "upstream": (
        Origin("http", "upstream", 9000),
        "https://api.example.com/v1/",
        Origin("https", "api.example.com", 443, "/v1"),
        "ftp://upstream",
        "must be http:// or https://",
    ),
    "listen": (Address("127.0.0.1", 8080), "[::1]:0", Address("::1", 0), "8080", "must be host:port"),
    "tls_cert_file": (None, "file.pem", PEM, "none.pem", "cannot be read: No such file"),
    "tls_key_file": (None, "file.pem", PEM, ".", "cannot be read: Is a directory"),
    "admin_listen": (Address("127.0.0.1", 8081), "localhost:1", Address("localhost", 1), "h:65536", "over 65535"),
    "admin_tokens_file": (None, "file.pem", PEM, "none.pem", "cannot be read: No such file"),
    "admin_session_s": (28_800.0, "60", 60.0, "0", "must be"),
    "admin_hosts": ((), "Ops.test", ("ops.test",), "*.ops.test", "neither a name"),
    "admin_local_view": (True, "false", False, "maybe", "must be true or false"),
    "admin_user_header": (None, "X-Forwarded-Email", "X-Forwarded-Email", "X Email", "must name header fields"),
    "admin_user_proxies": ((), "10.0.0.0/8", (ip_network("10.0.0.0/8"),), "10.0.0.1/8", "must be networks"),
    "admin_users": (
        (),
        "operate:ana@a.test, view:*@a.test",
        (UserRole("operate", "ana@a.test"), UserRole("view", "*@a.test")),
        "ana@a.test",
        "must be view:NAME or operate:NAME",
    ),
    "admin_tls_cert_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "admin_tls_key_file": (None, "file.pem", PEM, ".", "cannot be read: Is a directory"),
    "admin_tls_ca_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "hosts": ((), "API.example.com, [::1]:80", ("api.example.com", "[::1]:80"), "*.example.com", "neither a name"),
    "trusted_proxies": (
        (),
        "10.0.0.0/8, ::1",
        (ip_network("10.0.0.0/8"), ip_network("::1/128")),
        "10.0.0.1/8",
        "must be networks",
    ),
    "ask_keys": (False, "true", True, "perhaps", "must be true or false"),
    "own_path": ("/.oncegate", "/a/own-path/", "/a/own-path", "/v1", "must be a path such as /.oncegate"),
    "public_base": (
        None,
        "https://api.example.com/v1/",
        Origin("https", "api.example.com", 443, "/v1"),
        "api.example.com",
        "must be http:// or https://",
    ),
    "pass_interim": (False, "true", True, "some", "must be true or false"),
    "pass_host": (False, "true", True, "maybe", "must be true or false"),
    "cors_origins": (
        (),
        "https://SHOP.example:443, http://localhost:3000,https://*.shop.example, moz-extension://a-b",
        ("https://shop.example", "http://localhost:3000", "https://*.shop.example", "moz-extension://a-b"),
        "shop.example",
        "must be origins such as https://shop.example",
    ),
    "cors_credentials": (False, "true", True, "maybe", "must be true or false"),
    "cors_by": ("auto", "api", "api", "me", "must be 'auto', 'api' or 'oncegate'"),
    "rewrite_location": (True, "false", False, "maybe", "must be true or false"),
    "rewrite_cookie_path": (False, "true", True, "maybe", "must be true or false"),
    "cookie_domain": ("", ".Shop.example", ".shop.example", "a b", "must be a domain such as shop.example, or drop"),
    "upstream_ca_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "upstream_cert_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "upstream_key_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "store_url": (
        SecretStr("embedded"),
        "redis://redis:6379/0",
        SecretStr("redis://redis:6379/0"),
        "http://redis",
        "must be embedded, redis://",
    ),
    "store_password": (SecretStr(""), "p@ss", SecretStr("p@ss"), "", ""),
    "store_ca_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "store_cert_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "store_key_file": (None, "file.pem", PEM, "none.pem", "cannot be read"),
    "run_dir": (None, "/run/oncegate", Path("/run/oncegate"), "", ""),
    "pages_dir": (None, "pages", Path("pages"), "", ""),
    "audit_retention_s": (34_560_000.0, "86400", 86400.0, "0", "greater than 0"),
    "migrate_url": (
        SecretStr(""),
        "postgresql://owner:pw@h1/orders",
        SecretStr("postgresql://owner:pw@h1/orders"),
        "redis://h1:6379/0",
        "must be postgresql://",
    ),
    "data_dir": (Path(".oncegate"), "/var/lib/oncegate", Path("/var/lib/oncegate"), "", ""),
    "embedded_max_bytes": (268_435_456, "8388608", 8_388_608, "1000", "must be at least 2097152"),
    "namespace": ("default", "orders", "orders", "two words", "visible ASCII"),
    "secret": (
        SecretStr(""),
        "sixteen bytes 16",
        SecretStr("sixteen bytes 16"),
        "fifteen bytes 1",
        "must have at least 16 bytes",
    ),
    "identity_change": ("refuse", "accept", "accept", "never", "must be 'refuse' or 'accept'"),
    "methods": (("POST", "PATCH"), "post,put,", ("POST", "PUT"), "POST,GET", "can only name POST, PATCH, PUT, DELETE"),
    "request_id_header": ("X-Request-Id", "off", "", "Idempotency-Key", "can carry a request's id"),
    "key_header": ("Idempotency-Key", "X-Command-Id", "X-Command-Id", "Transfer-Encoding", "can carry a key"),
    "key_required": (False, "1", True, "2", "must be true or false"),
    "scope_headers": (("known",), "Known,X-Tenant", ("known", "X-Tenant"), "Via", "must name header"),
    "stable_schemes": ((), "DPoP, Bare", ("dpop", "bare"), "a b", "must name schemes of Authorization"),
    "unknown_retention_s": (7_776_000.0, "0", 0.0, "-1", "must be at least 0"),
    "tombstone_s": (0.0, "3600.5", 3600.5, "-1", "must be at least 0"),
    "retention_s": (86_400.0, "3600.5", 3600.5, "0", "must be greater than 0"),
    "lease_ms": (10_000, "200", 200, "199", "must be at least 200"),
    "release_statuses": (("default",), "429,503+Retry-After", ("429", "503+retry-after"), "42", "is not a status"),
    "on_duplicate": ("reject", "wait", "wait", "ignore", "must be 'reject', 'wait' or 'join'"),
    "wait_max_s": (30.0, "0.5", 0.5, "inf", "must be a finite number"),
    "max_waiters": (1024, "0", 0, "-1", "must be at least 0"),
    "max_followers": (1024, "0", 0, "-1", "must be at least 0"),
    "on_unknown": ("hold", "retry", "retry", "guess", "must be 'hold' or 'retry'"),
    "on_store_down": ("refuse", "bypass", "bypass", "panic", "must be 'refuse' or 'bypass'"),
    "store_timeout_ms": (1000, "50", 50, "0", "must be at least 1"),
    "settle_timeout_s": (30.0, "5", 5.0, "-1", "must be greater than 0"),
    "durability": ("memory", "fsync", "fsync", "stone", "must be 'memory', 'replicated' or 'fsync'"),
    "store_schema": ("oncegate", "once_2", "once_2", "pg_once", "must be a name of lower-case letters"),
    "promotion": ("any", "most-advanced", "most-advanced", "first", "must be 'any' or 'most-advanced'"),
    "audit": (False, "on", True, "maybe", "must be true or false"),
    "store_max_bytes": (0, "1000000", 1_000_000, "1 GB", "must be a whole number"),
    "on_store_loss": ("continue", "quarantine", "quarantine", "cry", "must be 'continue' or 'quarantine'"),
    "record_layout": ("auto", "packed", "packed", "json", "must be 'auto', 'hash' or 'packed'"),
    "quarantine_s": (60.0, "1", 1.0, "0", "must be greater than 0"),
    "connect_timeout_s": (5.0, "0.2", 0.2, "fast", "must be a number"),
    "upstream_timeout_s": (300.0, "60", 60.0, "nan", "must be a finite number"),
    "upstream_reuse_idle_s": (1.0, "0", 0.0, "-0.1", "must be at least 0"),
    "upstream_rest_s": (0.2, "0", 0.0, "-0.1", "must be at least 0"),
    "upstream_spare_connections": (None, "64", 64, "-1", "must be at least 0"),
    "max_upstream_connections": (1200, "1", 1, "0", "must be at least 1"),
    "dns_ttl_s": (1.0, "0.5", 0.5, "0", "must be at least 0.1"),
    "connect_retries": (3, "0", 0, "21", "must be at most 20"),
    "max_request_bytes": (33_554_432, "1024", 1024, "32MiB", "must be a whole number"),
    "max_buffered_bytes": (268_435_456, "33554432", 33_554_432, "0", "must be at least 1"),
    "spool_dir": (Path(tempfile.gettempdir()), ".", Path("."), "nowhere", "must be a writable folder"),
    "max_spool_bytes": (1_073_741_824, "33554432", 33_554_432, "1.5", "must be a whole number"),
    "max_stored_bytes": (16_777_216, "1024", 1024, "0", "must be at least 1"),
    "max_in_flight": (4096, "1", 1, "0", "must be at least 1"),
    "max_connections": (8192, "1", 1, "1000001", "must be at most 1000000"),
    "max_head_bytes": (65_536, "100000", 100_000, "8191", "must be at least 8192"),
    "max_head_line_bytes": (16_384, "1024", 1024, "1023", "must be at least 1024"),
    "max_head_fields": (128, "16", 16, "4097", "must be at most 4096"),
    "client_stall_s": (30.0, "1", 1.0, "1e300", "must be at most 315360000"),
    "client_min_bytes_per_s": (240, "0", 0, "-1", "must be at least 0"),
    "workers": (1, "3", 3, "0", "must be at least 1"),
    "drain_delay_s": (0.0, "5", 5.0, "-1", "must be at least 0"),
    "drain_s": (25.0, "0", 0.0, "-1", "must be at least 0"),
    "log_level": ("info", "DEBUG", "debug", "loud", "must be 'debug', 'info', 'warning' or 'error'"),
    "log_format": ("json", "console", "console", "xml", "must be 'json' or 'console'"),
    "access_log_path": (True, "no", False, "2", "must be true or false"),
    "access_log": ("notable", "off", "off", "some", "must be 'off', 'notable' or 'all'"),
    "trace_rate_per_s": (0.0, "50", 50.0, "-1", "must be at least 0"),
    "trace_ratio": (0.0, "0.01", 0.01, "1.5", "must be at most 1"),
    "docs_url": (
        None,
        "https://git.test/oncegate/docs/",
        Origin("https", "git.test", 443, "/oncegate/docs"),
        "https://git.test/docs?x=1",
        "must be http:// or https://",
    ),
    "rules_file": (None, "file.pem", PEM, "none.toml", "cannot be read: No such file"),
    "head_cache": (True, "false", False, "maybe", "must be true or false"),
    "testing": (False, "1", True, "2", "must be true or false"),
    "fault": ((), "kill@claimed:1, pause@sent:2:300", FAULTS, "kill@nowhere:1", "has an unknown point"),
}

IN_POSTGRES = {"store_url": "postgresql://app@h/db"}
# What an override needs beside it to make sense.
BESIDE = {
    "fault": {"testing": "1"},
    "store_password": {"store_url": "redis://redis"},
    "store_ca_file": {"store_url": "rediss://redis"},
    "store_cert_file": {"store_url": "rediss://redis", "store_key_file": "file.pem"},
    "store_key_file": {"store_url": "rediss://redis", "store_cert_file": "file.pem"},
    "trace_ratio": {"trace_rate_per_s": "50"},
    "store_schema": IN_POSTGRES,
    "promotion": IN_POSTGRES,
    "audit": IN_POSTGRES,
    "store_max_bytes": IN_POSTGRES,
    "tls_cert_file": {"tls_key_file": "file.pem"},
    "admin_tls_cert_file": {"admin_tls_key_file": "file.pem"},
    "admin_tls_key_file": {"admin_tls_cert_file": "file.pem"},
    "admin_tls_ca_file": {
        "admin_tls_cert_file": "file.pem",
        "admin_tls_key_file": "file.pem",
        "admin_users": "view:ana",
    },
    "admin_user_header": {"admin_user_proxies": "10.0.0.7", "admin_users": "view:ana"},
    "admin_user_proxies": {"admin_user_header": "X-Forwarded-Email", "admin_users": "view:ana"},
    "tls_key_file": {"tls_cert_file": "file.pem"},
    "upstream_ca_file": {"upstream": "https://upstream"},
    "upstream_cert_file": {"upstream": "https://upstream", "upstream_key_file": "file.pem"},
    "upstream_key_file": {"upstream": "https://upstream", "upstream_cert_file": "file.pem"},
}


def variable(name: str) -> str:
    return f"ONCEGATE_{name.upper()}"


@pytest.fixture(autouse=True)
def _alone(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.upper().startswith("ONCEGATE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    PEM.write_text("a certificate")
    monkeypatch.setenv("ONCEGATE_UPSTREAM", UPSTREAM)


@pytest.fixture
def given(monkeypatch):
    def given(**values: str) -> None:
        for name, value in values.items():
            monkeypatch.setenv(variable(name), value)

    return given


def errors() -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        load_settings()
    return caught.value.errors


def test_every_setting_has_a_case():
    """Every setting is tested for its default, an override and a bad value."""
    assert set(CASES) == set(Settings.model_fields)


@pytest.mark.parametrize("name", CASES)
def test_default(name):
    """With nothing but the upstream named, a setting has its documented default."""
    value = getattr(load_settings(), name)
    assert value == CASES[name][0]
    assert type(value) is type(CASES[name][0])


@pytest.mark.parametrize("name", CASES)
def test_override(name, given):
    """A variable sets its setting, parsed for use."""
    given(**BESIDE.get(name, {}), **{name: CASES[name][1]})
    value = getattr(load_settings(), name)
    assert value == CASES[name][2]
    assert type(value) is type(CASES[name][2])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[4]])
def test_bad_value(name, given):
    """A bad value is one error, which begins with the variable's name and says what the value must be."""
    given(**{name: CASES[name][3]})
    (error,) = errors()
    assert error.startswith(f"{variable(name)}: ")
    assert CASES[name][4] in error


@pytest.mark.parametrize("name", [name for name in CASES if name != "upstream"])
def test_empty_counts_as_unset(name, given):
    """An empty variable counts as unset, because compose files pass unset variables as empty ones."""
    given(**{name: ""})
    assert getattr(load_settings(), name) == CASES[name][0]


def test_upstream_is_required(monkeypatch):
    """The upstream is the one setting without a default."""
    monkeypatch.delenv("ONCEGATE_UPSTREAM")
    assert errors() == ("ONCEGATE_UPSTREAM: is required",)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("null", "every page without an origin"),
        ("Null", "every page without an origin"),
        ("file://a", "such pages have the origin null"),
        ("https://shop.example/", "not even a slash"),
        ("https://shop.example/a", "and no path"),
        ("https://user@shop.example", "an origin has a scheme"),
        ("https://shop.example:0", "has the port 0"),
        ("https://shop.example:65536", "over 65535"),
        ("https://shop.*", "an origin has a scheme"),
        ("https://*shop.example", "an origin has a scheme"),
        ("https://*.*.example", "an origin has a scheme"),
        ("https://*", "an origin has a scheme"),
        ("*.shop.example", "an origin has a scheme"),
        ("https://", "an origin has a scheme"),
        ("https://shop_.example.", ""),
        ("https://10.1", "neither a name nor an address"),
        ("https://[::1", "an IPv6 address needs brackets"),
        ("https://a.test,https://a.test", "same name twice"),
    ],
)
def test_an_origin_of_pages_is_an_origin(text, reason, given):
    """What browsers would never send is refused: a list with it would look as if it granted something."""
    given(cors_origins=text)
    if reason:
        (error,) = errors()
        assert error.startswith("ONCEGATE_CORS_ORIGINS: ")
        assert reason in error
    else:
        load_settings()


def test_settings_do_not_change():
    """Settings are frozen."""
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().lease_ms = 5


@pytest.mark.parametrize(
    ("text", "origin", "authority"),
    [
        ("HTTP://API.Example.com", Origin("http", "api.example.com", 80), "api.example.com"),
        ("https://h:443/", Origin("https", "h", 443), "h"),
        ("http://h:443/a/%2F//", Origin("http", "h", 443, "/a/%2F"), "h:443"),
        ("http://[2001:DB8:0::1]:8080/x", Origin("http", "2001:db8::1", 8080, "/x"), "[2001:db8::1]:8080"),
        ("http://münchen.example", Origin("http", "xn--mnchen-3ya.example", 80), "xn--mnchen-3ya.example"),
        ("http://my_service", Origin("http", "my_service", 80), "my_service"),
        ("https://api.test.", Origin("https", "api.test.", 443), "api.test"),
    ],
)
def test_upstream_forms(text, origin, authority, given):
    """An upstream is a name or an address, with or without port and path prefix, and reads back the same."""
    given(upstream=text)
    assert load_settings().upstream == origin
    assert origin.authority == authority
    given(upstream=str(origin))
    assert load_settings().upstream == origin


@pytest.mark.parametrize(
    "text",
    [
        f"http://user:{CANARY}@h",
        f"http://h?token={CANARY}",
        f"http://h/#{CANARY}",
        f"http://:{CANARY}℀@h",
        "http://",
        "http:///path",
        "http://h:0",
        "http://h:",
        "http://h:65536",
        "http://h/a b",
        "http://h/%2",
        "http://h\t/",
        "http://h\\@evil",
        "http://1.2.3.400",
        "http://10.1",
        "http://[::1",
        "http://[fe80::1%25eth0]",
        "http://a..b",
        "http://-a",
        "http://straße.example",
        f"http://{'a' * 64}.example",
    ],
)
def test_upstream_refused(text, given):
    """An upstream that is not a plain base URL is refused, and not repeated in the error."""
    given(upstream=text)
    (error,) = errors()
    assert error.startswith("ONCEGATE_UPSTREAM: ")
    assert CANARY not in error


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://redis", "redis://redis"),
        ("rediss://redis:6380/3", "rediss://redis:6380/3"),
        (f"redis://:{CANARY}@redis?db=1", "redis://:***@redis?db=1"),
        (f"redis://app:{CANARY}@[::1]:6379/", "redis://app:***@[::1]:6379/"),
        (f"redis://app:{CANARY}@{CANARY}:x@redis", "redis://app:***@redis"),
        ("redis+unix:///run/a@b:c@d.sock?db=2", "redis+unix:///run/a@b:c@d.sock?db=2"),
        (f"redis+unix://app:{CANARY}@/run/redis.sock", "redis+unix://app:***@/run/redis.sock"),
        ("redis+sentinel://h1:26379,h2,[::1]:1/orders?db=2", "redis+sentinel://h1:26379,h2,[::1]:1/orders?db=2"),
        (
            f"rediss+sentinel://app:{CANARY}@h1/orders?sentinel_password={CANARY}&db=1",
            "rediss+sentinel://app:***@h1/orders?sentinel_password=***&db=1",
        ),
        (
            f"redis+sentinel://h1/orders?sentinel_user=s&sentinel_password={CANARY}",
            "redis+sentinel://h1/orders?sentinel_user=s&sentinel_password=***",
        ),
        ("redis+cluster://h1:7000,h2:7001", "redis+cluster://h1:7000,h2:7001"),
        (f"rediss+cluster://app:{CANARY}@h1:7000,h2", "rediss+cluster://app:***@h1:7000,h2"),
        ("postgresql://app@h1/db", "postgresql://app@h1/db"),
        (
            f"postgres://app:{CANARY}@h1:5433,h2,[::1]:1/db?sslmode=require",
            "postgres://app:***@h1:5433,h2,[::1]:1/db?sslmode=require",
        ),
        (
            f"postgresql://app:{CANARY}@/db?host=/run/postgresql&port=5433",
            "postgresql://app:***@/db?host=/run/postgresql&port=5433",
        ),
        (
            "postgresql://app@h/db?sslmode=verify-full&sslrootcert=file.pem&sslcert=file.pem&sslkey=file.pem",
            "postgresql://app@h/db?sslmode=verify-full&sslrootcert=file.pem&sslcert=file.pem&sslkey=file.pem",
        ),
    ],
)
def test_store_urls(url, shown, given):
    """A store URL stays unchanged, and is shown with its user and without its password."""
    given(store_url=url)
    settings = load_settings()
    assert settings.store_url.get_secret_value() == url
    assert f"ONCEGATE_STORE_URL = {shown}\n" in describe(settings)
    assert CANARY not in describe(settings) + repr(settings) + str(settings)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{CANARY}",
        f"redis://:12/{CANARY}@redis",
        f"redis://:12?{CANARY}@redis",
        f"redis://:12#{CANARY}@redis",
        f"redis://:[{CANARY}@redis",
        f"redis://:{CANARY}℀@redis",
        f"redis://:{CANARY} @redis",
        f"redis://redis?password={CANARY}",
        f"redis://app:{CANARY}@redis/1?db=2",
        f"redis://app:{CANARY}@redis:0",
        f"redis://app:{CANARY}@redis:65536",
        f"redis://app:{CANARY}@redis/zero",
        f"redis+unix://{CANARY}/redis.sock",
        f"redis+unix:///{CANARY}\n.sock",
        f"redis+sentinel://:{CANARY}@h1,h2",
        f"redis+sentinel://:{CANARY}@h1,h2/",
        f"redis+sentinel://:{CANARY}@h1,,h2:0/service",
        f"redis+sentinel://:{CANARY}@h1,h1/service",
        f"redis+sentinel://h1/service?password={CANARY}",
        f"redis+sentinel://h1/service?{CANARY}",
        f"redis+sentinel://h1/service?db={CANARY}",
        f"redis+sentinel://h1/service?sentinel_password=a&sentinel_password={CANARY}",
        f"redis+sentinel://h1/service?sentinel%5Fpassword={CANARY}",
        f"redis://:%ff{CANARY}@redis",
        f"redis+sentinel://h1/service?sentinel_password=%ff{CANARY}",
        f"redis+sentinel://h1/{CANARY} ",
        f"redis+cluster://:{CANARY}@h1,h2/1",
        f"redis+cluster://h1,h2?db={CANARY}",
        f"redis+cluster://h1,{CANARY}:66000",
        f"{CANARY}",
        f"postgresql://app:{CANARY}/@h/db",
        f"postgresql://app:{CANARY}@h1@h2/db",
        f"postgresql://app:%ff{CANARY}@h/db",
    ],
)
def test_store_urls_refused(url, given):
    """A malformed store URL is refused without a word of it in the error."""
    given(store_url=url)
    (error,) = errors()
    assert error.startswith("ONCEGATE_STORE_URL: ")
    assert CANARY not in error


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("postgresql://h/db", "must be postgresql://user:password@host:port/database"),
        ("postgresql://app@h", "must be postgresql://user:password@host:port/database"),
        ("postgresql://app@h/", "must name the database"),
        ("postgresql://app@h:0/db", "has the port 0"),
        ("postgresql://app@h,h/db", "has the same name twice"),
        ("postgresql://app@/db", "must name a host, or the folder of a Unix socket"),
        ("postgresql://app@/db?host=run", "must name a host, or the folder of a Unix socket"),
        ("postgresql://app@h/db?host=/run", "names its hosts twice"),
        ("postgresql://app@h/db?password=x", "can only have host, port, sslcert"),
        ("postgresql://app@h/db?sslmode=disable&sslmode=require", "has the same name twice"),
        ("postgresql://app@h/db?sslmode=full", "has an sslmode that is none of disable, allow"),
        ("postgresql://app@h/db?sslmode=require&sslrootcert=file.pem", "counts only with sslmode=verify-full"),
        ("postgresql://app@h/db?sslmode=verify-full", "needs an sslrootcert for sslmode=verify-full"),
        ("postgresql://app@h/db?sslmode=verify-ca&sslrootcert=none.pem", "names a file as sslrootcert that cannot be"),
        ("postgresql://app@h/db?sslcert=file.pem", "needs both sslcert and sslkey"),
    ],
)
def test_urls_of_postgres_refused(url, complaint, given):
    """A URL of PostgreSQL that cannot work, or that does less than it seems to say, is refused with the reason."""
    given(store_url=url)
    (error,) = errors()
    assert error.startswith("ONCEGATE_STORE_URL: ")
    assert complaint in error


def test_defaults_in_postgres(given):
    """A store in PostgreSQL is durable and audited, if nothing else is set; also beside an invalid setting."""
    given(store_url="postgresql://app@h/db")
    assert (load_settings().durability, load_settings().audit) == ("fsync", True)
    given(lease_ms="1")
    (error,) = errors()
    assert error.startswith("ONCEGATE_LEASE_MS: ")
    given(lease_ms="", durability="memory", audit="off")
    assert (load_settings().durability, load_settings().audit) == ("memory", False)


SPELLED = ("p+w%2Bx%20y%25%zz", "p+w+x y%%zz")  # as a URL spells a password, and what it is


@pytest.mark.parametrize(
    "url",
    [
        f"redis://u+s%2B:{SPELLED[0]}@h",
        f"rediss://u+s%2B:{SPELLED[0]}@h:1/2",
        f"unix://u+s%2B:{SPELLED[0]}@/a+b%2B%20c?db=1",
        parse_server_group(f"redis+cluster://u+s%2B:{SPELLED[0]}@h").server_url("h:1"),
        parse_server_group(f"redis+sentinel://u+s%2B:{SPELLED[0]}@h/m").server_url("h:1"),
        parse_server_group(f"redis+sentinel://h/m?sentinel_user=u+s%2B&sentinel_password={SPELLED[0]}").sentinel_url(
            "h:1"
        ),
    ],
)
def test_a_plus_in_a_store_url_is_a_plus(url):
    """Every part of a store URL is percent-decoded once, and a plus stays a plus: also in a query."""
    found = parse_url(url)
    assert (found["username"], found["password"]) == ("u+s+", SPELLED[1])
    assert found.get("path", "/a+b+ c") == "/a+b+ c"


def test_lists_do_not_repeat_or_end_empty(given):
    """An empty list and a list with the same name twice are refused."""
    given(hosts=" , ", scope_headers="X-Tenant,x-tenant")
    assert errors() == ("ONCEGATE_HOSTS: is an empty list", "ONCEGATE_SCOPE_HEADERS: has the same name twice")


@pytest.mark.parametrize("name", ["Connection", "te", "Content-Length", "Host", "Cookie", "a b", "é", ","])
def test_key_headers_refused(name, given):
    """A hop-by-hop field, a framing field, a credential and a malformed name cannot carry a key."""
    given(key_header=name)
    (error,) = errors()
    assert error.startswith("ONCEGATE_KEY_HEADER: must ")


@pytest.mark.parametrize("namespace", ["n" * 65, " ", "é", "a\x7f"])
def test_namespaces_refused(namespace, given):
    """A namespace is 1 to 64 visible ASCII characters."""
    given(namespace=namespace)
    assert errors() == ("ONCEGATE_NAMESPACE: must be 1 to 64 visible ASCII characters",)


def test_all_errors_at_once(given):
    """Unknown names, bad values, unreadable files and contradictions are reported together."""
    given(lease_ms="1", upstream="nowhere", leese_ms="5", secret_file="none", tls_key_file="file.pem")
    assert sorted(error.partition(":")[0] for error in errors()) == [
        "ONCEGATE_LEASE_MS",
        "ONCEGATE_LEESE_MS",
        "ONCEGATE_SECRET_FILE",
        "ONCEGATE_TLS_CERT_FILE",
        "ONCEGATE_UPSTREAM",
    ]


def test_the_exception_reads_as_its_errors(given):
    """The exception's text is its errors, one a line."""
    given(lease_ms="1", drain_s="x")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert str(caught.value) == ("ONCEGATE_LEASE_MS: must be at least 200\nONCEGATE_DRAIN_S: must be a number")


def test_a_bad_value_is_in_no_contradiction(given):
    """A setting that is wrong by itself is not compared with others, the rest is."""
    given(retention_s="x", lease_ms="90000000", wait_max_s="100000", listen="[::]:8081")
    assert errors() == (
        "ONCEGATE_RETENTION_S: must be a number",
        "ONCEGATE_LEASE_MS: must be at most 86400000",
        "ONCEGATE_ADMIN_LISTEN: must not share its port with ONCEGATE_LISTEN",
    )


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ONCEGATE_LEASE", "ONCEGATE_LEASE_MS"),
        ("ONCEGATE_UPSTREAMS", "ONCEGATE_UPSTREAM"),
        ("oncegate_max_waiter", "ONCEGATE_MAX_WAITERS"),
        ("ONCEGATE_SECRETFILE", "ONCEGATE_SECRET_FILE"),
        ("ONCEGATE_FAULTS", "ONCEGATE_FAULT"),
        ("ONCEGATE_", ""),
    ],
)
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_unknown_variable(name, nearest, place, given, monkeypatch):
    """An unknown variable with the prefix is an error that names the nearest known one, and no value."""
    if place == ".env":
        Path(".env").write_text(f"{name}={CANARY}\n")
    else:
        monkeypatch.setenv(name, CANARY)
    (error,) = errors()
    assert error.startswith(f"{name.upper()}: is unknown; did you mean ONCEGATE_{nearest.removeprefix('ONCEGATE_')}")
    assert CANARY not in error


@pytest.mark.parametrize(
    "name",
    [
        "ONCEGATE_SERVICE_HOST",
        "ONCEGATE_SERVICE_PORT",
        "ONCEGATE_SERVICE_PORT_HTTP",
        "ONCEGATE_PORT",
        "ONCEGATE_PORT_8080_TCP",
        "ONCEGATE_PORT_8080_TCP_ADDR",
        "ONCEGATE_PORT_53_UDP_PROTO",
        "ONCEGATE_ADMIN_SERVICE_HOST",
        "ONCEGATE_ADMIN_SERVICE_PORT_METRICS",
        "ONCEGATE_ADMIN_PORT",
        "ONCEGATE_ADMIN_PORT_9090_TCP_PORT",
    ],
)
def test_injected_names_are_ignored(name, monkeypatch):
    """Variables that Kubernetes and Docker set for a service with the name oncegate are ignored."""
    monkeypatch.setenv(name, "tcp://10.0.0.1:8080")
    assert load_settings().listen == Address("127.0.0.1", 8080)


def test_names_beside_the_prefix_are_ignored(monkeypatch):
    """Variables of other programs are ignored, in the environment and in .env."""
    monkeypatch.setenv("ONCE_GATE", "x")
    Path(".env").write_text("LEASE_MS=1\nDATABASE_URL=x\n")
    assert load_settings().lease_ms == 10_000


def test_names_in_lower_case(monkeypatch):
    """A variable's name may be in lower case."""
    monkeypatch.setenv("oncegate_lease_ms", "300")
    assert load_settings().lease_ms == 300


def test_env_file(given):
    """.env in the working directory sets variables that the environment does not set, or sets to nothing."""
    Path(".env").write_text('ONCEGATE_LEASE_MS=300\nexport ONCEGATE_NAMESPACE="mine"  # why\nONCEGATE_DRAIN_S=3\n')
    given(lease_ms="400", drain_s="")
    settings = load_settings()
    assert (settings.lease_ms, settings.namespace, settings.drain_s) == (400, "mine", 3.0)


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        (f'\n \nONCEGATE_SECRET="{CANARY}\n', 3, "is not NAME=value"),
        (f"# why\nONCEGATE_SECRET='{CANARY}'s'\n", 2, "is not NAME=value"),
        (f"ONCEGATE_SECRET {CANARY}\n", 1, "is not NAME=value"),
        (f'OTHER="{CANARY}', 1, "is not NAME=value"),
        ("ONCEGATE_SECRET\n", 1, "has a name without ="),
        (f'ONCEGATE_SECRET="{CANARY}\nONCEGATE_LISTEN=it"\n', 1, "has a value of several lines"),
    ],
)
def test_env_file_with_a_line_that_is_none(text, line, reason):
    """A line of .env that cannot be read is an error that names the line and repeats nothing of it."""
    Path(".env").write_text(text)
    (error,) = errors()
    assert error.startswith(f".env:{line}: {reason}")
    assert CANARY not in error


def test_env_file_with_lines_of_others():
    """Names of other programs may have no value, or several lines."""
    Path(".env").write_text('PATH_ONLY\nCERT="one\ntwo"\n\n# end\nONCEGATE_LEASE_MS=300')
    assert load_settings().lease_ms == 300


@pytest.mark.parametrize("quote", ["", '"', "'"])
def test_env_file_replaces_no_variables(quote, monkeypatch):
    """A value in .env stays as it is written: `${NAME}` may be a part of a secret."""
    monkeypatch.setenv("HOME", "/root")
    Path(".env").write_text(f"ONCEGATE_SECRET={quote}${{HOME}}-${{NONE}}-{CANARY}{quote}\n")
    assert load_settings().secret.get_secret_value() == f"${{HOME}}-${{NONE}}-{CANARY}"


@pytest.mark.parametrize(("kind", "complaint"), [("fifo", "is not a regular file"), ("folder", "Is a directory")])
def test_env_file_that_is_no_file(kind, complaint):
    """An .env that is no regular file is an error, and nobody waits for its writer."""
    if kind == "fifo":
        os.mkfifo(".env")
    else:
        Path(".env").mkdir()
    (error,) = errors()
    assert error.startswith(".env: ")
    assert error.endswith(complaint)


def test_env_file_that_is_no_text():
    """An .env that cannot be decoded is an error, not a crash."""
    Path(".env").write_bytes(b"ONCEGATE_SECRET=\xff\n")
    assert errors() == (".env: cannot be read as UTF-8 text",)


@pytest.mark.parametrize("name", ["secret", "store_url"])
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_secret_from_a_file(name, place, given):
    """A secret can come from the file that <NAME>_FILE names, without its trailing newline."""
    Path("held").write_text("redis://:pass@redis\r\n")
    if place == ".env":
        Path(".env").write_text(f"{variable(name)}_FILE=held\n")
    else:
        given(**{f"{name}_file": "held"})
    assert getattr(load_settings(), name).get_secret_value() == "redis://:pass@redis"


def test_content_of_a_file_is_checked(given):
    """A store URL from a file passes the same checks, and is not repeated."""
    Path("held").write_text(f"redis://:{CANARY}@")
    given(store_url_file="held")
    (error,) = errors()
    assert error.startswith("ONCEGATE_STORE_URL: must be embedded")
    assert CANARY not in error


@pytest.mark.parametrize("name", ["secret", "store_url"])
def test_secret_after_a_byte_order_mark(name, given):
    """The mark that some editors write at a file's beginning is no part of the secret, nor of a name in .env."""
    Path("held").write_text("redis://:pass@redis", encoding="utf-8-sig")
    Path(".env").write_text(f"{variable(name)}_FILE=held\n", encoding="utf-8-sig")
    assert getattr(load_settings(), name).get_secret_value() == "redis://:pass@redis"


@pytest.mark.parametrize("name", [name for name in Settings.model_fields if name.endswith("_file")])
@pytest.mark.parametrize(
    ("path", "complaint"),
    [("fifo", "is not a regular file"), ("/dev/zero", "is not a regular file"), ("large", "is over 4194304 bytes")],
)
def test_files_refused(name, path, complaint, given):
    """A setting names a regular file of a bounded size: a pipe or a device would hang or never end."""
    os.mkfifo("fifo")
    with Path("large").open("wb") as file:
        file.truncate(4_194_305)
    given(**{name: path})
    assert f"{variable(name)}: {complaint}" in errors()


@pytest.mark.parametrize("name", ["secret", "store_url"])
def test_secret_named_twice(name, given):
    """A secret that is set both directly and by a file is a contradiction, in the environment and in .env."""
    Path("held").write_text("redis://redis:6379")
    Path(".env").write_text(f"{variable(name)}=redis://redis:6379\n")
    given(**{f"{name}_file": "held"})
    assert errors() == (f"{variable(name)}_FILE: contradicts {variable(name)}, which is also set",)


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        (CANARY, "cannot be read: No such file or directory"),
        (CANARY * 100, "cannot be read: File name too long"),
        (".", "cannot be read: Is a directory"),
        ("empty", "the file is empty"),
        ("mark", "the file is empty"),
        ("fifo", "is not a regular file"),
        ("/dev/zero", "is not a regular file"),
        ("large", "is over 65536 bytes"),
        ("bytes", "cannot be read as UTF-8 text"),
    ],
)
def test_secret_files_refused(path, complaint, given):
    """A secret's file that cannot be used is an error, which does not repeat what may be the secret itself."""
    Path("empty").write_text("\n")
    Path("bytes").write_bytes(b"\xff")
    Path("mark").write_text("\n", encoding="utf-8-sig")
    Path("large").write_text("x" * 65_537)
    os.mkfifo("fifo")
    given(secret_file=path)
    assert errors() == (f"ONCEGATE_SECRET_FILE: {complaint}",)


CLASHES = [
    ({"retention_s": "5"}, "retention_s", "lease_ms"),
    ({"retention_s": "20"}, "retention_s", "wait_max_s"),
    ({"tls_cert_file": "file.pem"}, "tls_key_file", "tls_cert_file"),
    ({"tls_key_file": "file.pem"}, "tls_cert_file", "tls_key_file"),
    ({"admin_tls_cert_file": "file.pem"}, "admin_tls_key_file", "admin_tls_cert_file"),
    ({"admin_tls_key_file": "file.pem"}, "admin_tls_cert_file", "admin_tls_key_file"),
    ({"admin_tls_ca_file": "file.pem", "admin_users": "view:ana"}, "admin_tls_cert_file", "admin_tls_ca_file"),
    (
        {"admin_tls_ca_file": "file.pem", "admin_tls_cert_file": "file.pem", "admin_tls_key_file": "file.pem"},
        "admin_users",
        "admin_tls_ca_file",
    ),
    ({"admin_user_header": "X-User", "admin_users": "view:ana"}, "admin_user_proxies", "admin_user_header"),
    ({"admin_user_header": "X-User", "admin_user_proxies": "::1"}, "admin_users", "admin_user_header"),
    ({"admin_user_proxies": "::1", "admin_users": "view:ana"}, "admin_user_header", "admin_user_proxies"),
    ({"upstream": "https://h", "upstream_cert_file": "file.pem"}, "upstream_key_file", "upstream_cert_file"),
    ({"upstream": "https://h", "upstream_key_file": "file.pem"}, "upstream_cert_file", "upstream_key_file"),
    ({"upstream_ca_file": "file.pem"}, "upstream_ca_file", "upstream"),
    ({"upstream_cert_file": "file.pem"}, "upstream_cert_file", "upstream"),
    ({"upstream_key_file": "file.pem"}, "upstream_key_file", "upstream"),
    ({"listen": "127.0.0.1:8081"}, "admin_listen", "listen"),
    ({"listen": "0.0.0.0:8081"}, "admin_listen", "listen"),
    ({"key_header": "x-api-key"}, "key_header", "scope_headers"),
    ({"key_header": "x-request-id"}, "key_header", "request_id_header"),
    ({"request_id_header": "X-Tenant", "scope_headers": "x-tenant"}, "scope_headers", "request_id_header"),
    ({"cors_origins": "*", "cors_credentials": "true"}, "cors_credentials", "cors_origins"),
    ({"max_spool_bytes": "33554431"}, "max_request_bytes", "max_spool_bytes"),
    ({"max_head_line_bytes": "65537"}, "max_head_line_bytes", "max_head_bytes"),
    ({"max_buffered_bytes": "16777215"}, "max_stored_bytes", "max_buffered_bytes"),
    ({"fault": "kill@claimed:1"}, "fault", "testing"),
    ({"durability": "replicated"}, "durability", "store_url"),
    ({"store_schema": "other"}, "store_schema", "store_url"),
    ({"promotion": "most-advanced"}, "promotion", "store_url"),
    ({"audit": "on", "store_url": "redis://redis"}, "audit", "store_url"),
    ({"store_password": "other"}, "store_password", "store_url"),
    ({"store_ca_file": "file.pem", "store_url": "redis://redis"}, "store_ca_file", "store_url"),
    ({"store_ca_file": "file.pem"}, "store_ca_file", "store_url"),
    ({"store_cert_file": "file.pem", "store_key_file": "file.pem"}, "store_cert_file", "store_url"),
    ({"store_cert_file": "file.pem", "store_key_file": "file.pem"}, "store_key_file", "store_url"),
    ({"store_cert_file": "file.pem", "store_url": "rediss://redis"}, "store_key_file", "store_cert_file"),
    ({"store_key_file": "file.pem", "store_url": "rediss://redis"}, "store_cert_file", "store_key_file"),
    ({"store_password": "other", "store_url": "redis://:own@redis"}, "store_password", "store_url"),
    ({"store_max_bytes": "1000"}, "store_max_bytes", "store_url"),
    ({"trace_ratio": "0.5"}, "trace_ratio", "trace_rate_per_s"),
    ({"spool_dir": "nowhere"}, "spool_dir", "max_spool_bytes"),
]


@pytest.mark.parametrize(("values", "first", "second"), CLASHES)
def test_contradiction(values, first, second, given):
    """Two settings that contradict each other are an error that names both."""
    given(**values)
    found = [error for error in errors() if error.startswith(f"{variable(first)}: ")]
    assert any(error.endswith(f" {variable(second)}") for error in found)


def test_every_contradiction_has_a_case():
    """Each row of the table of contradictions has a test."""
    assert {(first, second) for _, first, second in CLASHES} == {(row[0], row[2]) for row in CONTRADICTIONS}


@pytest.mark.parametrize(
    "values",
    [
        {"retention_s": "30", "lease_ms": "30000"},
        {"listen": "127.0.0.1:0", "admin_listen": "127.0.0.1:0"},
        {"listen": "127.0.0.1:8080", "admin_listen": "127.0.0.2:8080"},
        {"max_spool_bytes": "33554432", "max_buffered_bytes": "16777216"},
        {"durability": "replicated", "store_url": "redis://redis"},
        {"durability": "fsync"},
        {"store_url": "postgresql://app@h/db", "durability": "replicated", "promotion": "most-advanced"},
    ],
)
def test_limits_that_just_fit(values, given):
    """Values at the limit of a contradiction are accepted."""
    given(**values)
    load_settings()


def test_no_temporary_folder(monkeypatch, given):
    """Without a usable temporary folder, the error names the setting for that folder."""
    monkeypatch.setattr("tempfile.gettempdir", lambda: (_ for _ in ()).throw(FileNotFoundError()))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert errors() == ("ONCEGATE_SPOOL_DIR: must be a writable folder to hold ONCEGATE_MAX_SPOOL_BYTES",)


def test_describe(given):
    """`describe` has one line for each variable, in the form in which it can be set."""
    given(hosts="b.example,a.example", retention_s="3600", secret=CANARY, trusted_proxies="10.0.0.0/8")
    lines = describe(load_settings()).splitlines()
    assert [line.partition(" = ")[0] for line in lines] == [variable(name) for name in Settings.model_fields]
    for line in (
        "ONCEGATE_UPSTREAM = http://upstream:9000",
        "ONCEGATE_HOSTS = b.example,a.example",
        "ONCEGATE_TRUSTED_PROXIES = 10.0.0.0/8",
        "ONCEGATE_RETENTION_S = 3600",
        "ONCEGATE_PASS_HOST = false",
        "ONCEGATE_SECRET = set",
        "ONCEGATE_TLS_CERT_FILE = none",
        "ONCEGATE_METHODS = POST,PATCH",
    ):
        assert line in lines


def test_no_secret_is_shown(given):
    """A secret appears in no description, error or repr."""
    given(secret=CANARY, store_url=f"redis://app:{CANARY}@redis")
    settings = load_settings()
    assert CANARY not in describe(settings) + repr(settings) + str(settings)
    given(lease_ms="1", store_url=f"redis://app:{CANARY}@redis/x")
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert CANARY not in str(caught.value) + repr(caught.value)
    assert caught.value.__cause__ is None
    with pytest.raises(ValidationError) as raw:
        Settings()
    assert CANARY not in str(raw.value)


def test_table():
    """The reference table has one row for each setting, with its default and its description."""
    head, rule, *rows = table().splitlines()
    assert (head, rule) == ("| variable | default | meaning |", "|---|---|---|")
    assert [row.split("`")[1] for row in rows] == [variable(name) for name in Settings.model_fields]
    assert all(row.count("|") == 4 and row.endswith(". |") for row in rows)
    assert "| `ONCEGATE_DATA_DIR` | `./.oncegate` | Folder in which the embedded store keeps its data. |" in rows
    assert (
        "| `ONCEGATE_SPOOL_DIR` | the temporary folder | Folder for request bodies that are too large for memory. |"
        in rows
    )
    assert any(row.startswith("| `ONCEGATE_RETENTION_S` | `86400` |") for row in rows)


def test_table_does_not_depend_on_the_environment(given):
    """The reference table does not depend on the environment."""
    before = table()
    given(secret=CANARY, lease_ms="300")
    assert table() == before

"""What names a request, pinned: no change of it goes unnoticed by the proxies that share a store."""

import re
from pathlib import Path

import pytest

from oncegate.keys.digests import NAMING, Digests, Scope, identity_settings
from oncegate.keys.sources import SCOPE_KINDS, SOURCE_KINDS
from oncegate.messages.fields import by_name
from oncegate.messages.request_head import RequestHead
from oncegate.rules.body_conditions import read_document
from oncegate.rules.identity import Identity, ScopedRequest, identify, key_in_head, scope_of
from oncegate.rules.loading import load_rules
from oncegate.rules.model import Rules
from oncegate.rules.presets import PRESETS
from oncegate.settings.credentials import ACCOUNTS, CREDENTIALS
from oncegate.settings.settings import Settings

RULES = {
    "header": "",
    "joined": 'key = ["header:A", "query:q", "path:1"]',
    "alternatives": 'key = [["header:A"], ["body:/id"]]',
    "identity": 'key = [["id=cloudevent:id"], ["id=body:/id"]]',
    "receiver": 'key = ["receiver", "header:A"]',
    "member": 'key = "body:/id"',
    "form": 'key = "form:token"',
    "derived": 'key = "derived:10"',
    "namespace": 'namespace = "other"',
    "scope": 'scope = ["known", "header:X-Shop", "query:q", "path:1", "cookie:session"]',
    "no scope": "scope = []",
    "cookie": 'scope = ["cookie:session"]',
    "fingerprint": 'fingerprint = ["method", "body"]',
    "host": "pass_host = true",
    "mcp derived": 'preset = "mcp"\nkey = "derived:60"',
} | {preset: f'preset = "{preset}"' for preset in PRESETS}

FIELDS = [
    *("Idempotency-Key: key-1", "A: a", "X-Shop: s", "Content-Type: application/json", "Cookie: _ga=1; session=s"),
    *("PayPal-Request-Id: p", "X-GitHub-Delivery: g", "X-Shopify-Event-Id: e", "webhook-id: w", "ce-id: evt_1"),
    *("ce-source: /s", "x-stainless-retry-count: 1"),
]
JSON = (
    b'{"id": "evt_1", "idempotency_key": "k", "event_id": "e", "MessageId": "m", "message": {"messageId": "g"},'
    b' "source": "/s"}'
)
WHO = ["Authorization: Bearer a", "Stripe-Account: acct_1", "x-goog-api-key: g"]
BOUNDARY = "Content-Type: multipart/form-data; boundary=b"
MULTIPART = b'--b\r\nContent-Disposition: form-data; name="token"\r\n\r\nt\r\n--b--\r\n'
CALL = b"""{"id": 7, "method": "tools/call", "params": {"name": "pay", "arguments": {"amount": 1}, "_meta": {
    "idempotencyKey": "k", "progressToken": 7}}}"""
MESSAGE = b"""{"id": 7, "method": "message/send", "params": {"message": {"messageId": "m", "parts": []}}}"""
# What is special about some requests: other fields, and another body.
SPECIAL = {
    "mcp": ("mcp", WHO, CALL),
    "mcp header": ("mcp", ["Idempotency-Key: key-1"], CALL),
    "mcp derived": ("mcp derived", WHO, CALL),
    "mcp another id": ("mcp derived", WHO, CALL.replace(b"7", b"8")),
    "a2a": ("a2a", WHO, MESSAGE),
    "json-rpc": ("json-rpc", ["Idempotency-Key: key-1"], CALL),
    "header quoted": ("header", ['Idempotency-Key: "key-1"'], JSON),
    "header alone": ("header", ["Idempotency-Key: key-1"], b""),
    "alternatives body": ("alternatives", [*WHO, "Content-Type: application/json"], JSON),
    "number": ("member", WHO, b'{"id": 17}'),
    "form": ("form", [*WHO, "Content-Type: application/x-www-form-urlencoded"], b"a=1&token=t"),
    "multipart": ("form", [*WHO, BOUNDARY], MULTIPART),
    "multipart derived": ("derived", [*WHO, BOUNDARY], MULTIPART),
    "coding": ("header", [*WHO, "Idempotency-Key: k", "Content-Encoding: gzip"], b"\x1f"),
    "cookies": ("header", ["Idempotency-Key: key-1", "Cookie: session=s; _ga=1"], JSON),
    "account alone": ("header", ["Idempotency-Key: key-1", "X-Account: 1", "Cookie: session=s"], JSON),
    "structured event": ("cloudevents", ["Content-Type: application/cloudevents+json"], JSON),
    "svix": ("standard-webhooks", ["svix-id: w"], JSON),
}

# What means the same has one key.
SAME = [
    ("header", "fingerprint", "host", "payments", "stripe"),
    ("member", "alternatives body"),
    ("form", "multipart"),
    ("no scope", "header quoted", "header alone"),
    ("standard-webhooks", "svix"),
    ("cloudevents", "structured event"),
    ("mcp derived", "mcp another id"),
]

# Other names here mean that retries across an upgrade execute again: raise NAMING, say so in the changelog, and write
# the new names here. Each is the beginning of the key's digest and of the fingerprint.
VERSION = 2
NAMES: dict[str, str] = {
    "mcp derived": "6a2468d1802a 61db5c02bd4b",
    "mcp": "e8633d6cebbf b7693e58588a",
    "a2a": "8eb3e6ca101e 02f46164e653",
    "json-rpc": "9cd203bd2221 009079e4484a",
    "mcp header": "697d94e607d8 b7693e58588a",
    "mcp another id": "6a2468d1802a 61db5c02bd4b",
    "header": "eda29674362a c0f615a5fd95",
    "joined": "9ae887d907d1 ecd43e44232a",
    "alternatives": "334b7b0b40c0 411b273d49c0",
    "identity": "9fd12c717438 c35212b4ba9f",
    "receiver": "00a5582f149e ad2001ccd6af",
    "member": "ac9c5d2ec4b1 71ecaedc3017",
    "form": "242fff249c4c 8705d486520e",
    "derived": "7a618a92583e 953a0e744b62",
    "namespace": "a90f76ac799a 6d4c341ed0c5",
    "scope": "5f722faa0bca a7d68972a2b4",
    "no scope": "89da2dd38a74 3c2cf8007dcf",
    "cookie": "3418a8a3d524 118167affb78",
    "fingerprint": "eda29674362a 50f83c31429d",
    "host": "eda29674362a 491fcc8c677d",
    "payments": "eda29674362a ecfca1116352",
    "stripe": "eda29674362a f8f5913caf15",
    "square": "bf11cb1e520f 10c4fce73408",
    "paypal": "14a35ea45939 019169ba8f29",
    "stripe-webhook": "6d8825e7f1d4 1b2b0116d0fc",
    "paypal-webhook": "913d3f416f17 1b2b0116d0fc",
    "github-webhook": "3fc8acb7c850 1b2b0116d0fc",
    "shopify-webhook": "c53f389a0350 1b2b0116d0fc",
    "standard-webhooks": "09b760257e85 1b2b0116d0fc",
    "slack-events": "035dcf9d6606 1b2b0116d0fc",
    "sns": "70c1597e89f0 1b2b0116d0fc",
    "pubsub-push": "87a0ce49f9c4 1b2b0116d0fc",
    "cloudevents": "fff83d2f03b3 1b2b0116d0fc",
    "openai": "83c69f793da1 d0c5412dfead",
    "anthropic": "64f8bfa591d5 40c379bca90d",
    "gemini": "d2bf31fa9d3f 07482c637aa9",
    "double-click": "de8e95c6514e f76da160b092",
    "header quoted": "89da2dd38a74 573dc1520470",
    "header alone": "89da2dd38a74 75d827faaf80",
    "alternatives body": "ac9c5d2ec4b1 411b273d49c0",
    "number": "7920142d87d8 939477c4485f",
    "multipart": "242fff249c4c d6738e8f468c",
    "multipart derived": "5cfa9bee3f28 7a3ef815ec8d",
    "coding": "cad32af4c0e2 1a6a6db618bd",
    "cookies": "b9d9c0c7a36c 573dc1520470",
    "account alone": "6a1f57ffad17 573dc1520470",
    "structured event": "fff83d2f03b3 1b2b0116d0fc",
    "svix": "09b760257e85 1b2b0116d0fc",
    "Authorization": "405f41913b63 573dc1520470",
    "X-Api-Key": "3bdb662a06e6 573dc1520470",
    "Api-Key": "94f6a8cc1273 573dc1520470",
    "Api_Key": "678387e574cb 573dc1520470",
    "ApiKey": "0db5fdcc4f07 573dc1520470",
    "X-Goog-Api-Key": "177c4c5b1400 573dc1520470",
    "Ocp-Apim-Subscription-Key": "546976cc3d56 573dc1520470",
    "X-Auth-Token": "73d02b247875 573dc1520470",
    "X-Auth-Key": "a3d36c2e0177 573dc1520470",
    "X-Access-Token": "126e79dfa049 573dc1520470",
    "X-Session-Token": "373372cfb7c4 573dc1520470",
    "Private-Token": "d88bc0971937 573dc1520470",
    "Job-Token": "e54d398b343e 573dc1520470",
    "Deploy-Token": "954293fdbbbf 573dc1520470",
    "X-Shopify-Access-Token": "962cd632f7e7 573dc1520470",
    "X-Amz-Security-Token": "565d72d9665a 573dc1520470",
    "X-Amz-Access-Token": "df23e577d369 573dc1520470",
    "X-Vault-Token": "897ec2d07bdd 573dc1520470",
    "X-Postmark-Server-Token": "418308fc14b1 573dc1520470",
    "X-Subscription-Token": "b2cbd5b79603 573dc1520470",
    "X-RapidAPI-Key": "ac767ea37197 573dc1520470",
    "Xi-Api-Key": "fe946b170b09 573dc1520470",
    "DD-Api-Key": "a63103822666 573dc1520470",
    "Circle-Token": "1f17393d53d9 573dc1520470",
    "Stripe-Account": "c9bff6a82e57 573dc1520470",
    "Stripe-Context": "c15f52798a44 573dc1520470",
    "OpenAI-Organization": "439bd518ed5a 573dc1520470",
    "OpenAI-Project": "121442428d34 573dc1520470",
    "X-Goog-User-Project": "f90fa087e50f 573dc1520470",
    "PayPal-Auth-Assertion": "92c80c9c5e87 573dc1520470",
    "Xero-Tenant-Id": "fe837cd192c8 573dc1520470",
    "X-On-Behalf-Of": "01abbf5d9b55 573dc1520470",
    "X-Vault-Namespace": "1ab901b189f0 573dc1520470",
    "X-Auth-Email": "d473045ca1f5 573dc1520470",
    "X-Account": "b355f7659df3 573dc1520470",
    "X-Account-Id": "ba2a2d3dc7dc 573dc1520470",
    "X-Tenant": "8679745d5e7e 573dc1520470",
    "X-Tenant-Id": "2d0c9920a5a8 573dc1520470",
    "X-Org": "de99ae5622f4 573dc1520470",
    "X-Org-Id": "941aa78ea125 573dc1520470",
    "X-Organization": "de7baa1be87e 573dc1520470",
    "X-Organization-Id": "b1c95d2275bb 573dc1520470",
    "X-Project-Id": "8d338d81147d 573dc1520470",
    "X-Workspace-Id": "e03619d3d359 573dc1520470",
    "X-Merchant-Id": "fb6ea8c112d3 573dc1520470",
    "X-Customer-Id": "7af8b975c30b 573dc1520470",
    "X-User-Id": "f99942bffbd3 573dc1520470",
    "X-Forwarded-User": "0b222d2505fc 573dc1520470",
    "X-Auth-Request-User": "9805fdd1194b 573dc1520470",
    "X-Consumer-Id": "9d7db6c1e1dc 573dc1520470",
    "X-Amzn-Oidc-Identity": "d48116480ff5 573dc1520470",
    "X-Goog-Authenticated-User-Id": "bcc7e6e1e2e5 573dc1520470",
    "X-Ms-Client-Principal-Id": "890da0859666 573dc1520470",
    "Cf-Access-Authenticated-User-Email": "33a07d6c2ea7 573dc1520470",
}


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> Rules:
    file = tmp_path_factory.mktemp("naming") / "rules.toml"
    tables = (f'[[rule]]\nname = "{name}"\npath = "/{name.replace(" ", "-")}/**"\n{RULES[name]}\n' for name in RULES)
    file.write_text("\n".join(tables))
    return load_rules(Settings(upstream="http://api.test", rules_file=str(file)))  # type: ignore[arg-type]


def names(rules: Rules, rule: str, lines: list[str], body: bytes) -> str:
    """Return the names of a request as the request path gives them."""
    digests = Digests(b"a secret")
    pairs = [(name.encode(), value.encode()) for name, _, value in (line.partition(": ") for line in lines)]
    target = f"/{rule.replace(' ', '-')}/x?q=1".encode()
    head = RequestHead("POST", target, False, b"api.test", pairs, by_name(pairs))
    policy = (rules.choose(head, read_document(head.fields, body)) or rules.default).policy
    assert policy.rule == rule
    scope = scope_of(policy, digests, head)
    key = key_in_head(policy, head)
    assert isinstance(scope, Scope)
    assert isinstance(key, bytes | None)
    found = identify(policy, digests, ScopedRequest(head, scope, key, Whole(body)))
    assert isinstance(found, Identity)
    return f"{found.key.hex()[:12]} {found.fingerprint.hex()[:12]}"


class Whole:
    spooled = False

    def __init__(self, data: bytes) -> None:
        self.data = data

    def blocks(self) -> tuple[bytes]:
        return (self.data,)


def requests() -> dict[str, tuple[str, list[str], bytes]]:
    usual = {rule: (rule, [*FIELDS, *WHO], JSON) for rule in RULES}
    known = {
        name: ("header", ["Idempotency-Key: key-1", f"{name}: Bearer a"], JSON) for name in (*CREDENTIALS, *ACCOUNTS)
    }
    return usual | SPECIAL | known


@pytest.mark.parametrize("case", requests())
def test_a_request_has_the_name_that_it_had(rules, case):
    """Where this fails, the version of naming has to be raised: see NAMES."""
    assert (NAMING, names(rules, *requests()[case])) == (VERSION, NAMES.get(case))


def test_each_name_is_of_one_request_alone():
    """No two of these requests have one key, but those that mean the same."""
    assert NAMES.keys() == requests().keys()
    keys = {name: text.split()[0] for name, text in NAMES.items()}
    groups = {frozenset(other for other in keys if keys[other] == keys[name]) for name in keys}
    assert {group for group in groups if len(group) > 1} == set(map(frozenset, SAME))


def test_each_kind_of_source_is_pinned():
    text = Path(__file__).read_text()
    assert [kind for kind in SOURCE_KINDS.keys() | SCOPE_KINDS if not re.search(rf'["=]{kind}:', text)] == []


def test_the_version_of_naming_is_part_of_the_identity():
    """Proxies that name otherwise differ as those with another secret do."""
    text = identity_settings(Digests(b""), "default", "Idempotency-Key", ["known"])
    assert text == f"naming={NAMING} namespace=default secret=none scope=known key_header=idempotency-key"

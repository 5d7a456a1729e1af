"""What a key is, whose it is, and what its duplicates get."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, SecretStr

from oncegate.settings.credentials import KNOWN, parse_scheme, parse_scope
from oncegate.settings.names import parse_key_header, parse_method, parse_namespace, parse_secret
from oncegate.settings.statuses import DEFAULT, parse_status
from oncegate.settings.values import DAY_MS, MILLION, Seconds, SecondsOrForever, SecondsOrZero, from_text, list_of


class KeySettings(BaseModel):
    """A group of `Settings`."""

    namespace: Annotated[str, from_text(parse_namespace)] = Field(
        "default",
        description="Part of each key's scope. Deployments with separate keys on one store need different namespaces, "
        "and `ONCEGATE_IDENTITY_CHANGE=accept`.",
    )
    secret: Annotated[SecretStr, from_text(parse_secret)] = Field(
        SecretStr(""),
        description="Secret of the digests of keys, tenants and bodies, of at least 16 bytes. All proxies need the "
        "same one. After a change oncegate does not find any earlier key. Without one, whoever reads the store can "
        "test guesses of keys. `ONCEGATE_SECRET_FILE` names a file that contains the secret.",
    )
    # Two replicas that name keys differently would each execute the same request.
    identity_change: Literal["refuse", "accept"] = Field(
        "refuse",
        description="What a proxy does if its namespace, secret, scope headers, key header or version of naming differ "
        "from those of other proxies on its store. `refuse`: it is not ready and refuses requests with keys. `accept`: "
        "it serves.",
    )
    # PUT and DELETE are idempotent by definition (RFC 9110, section 9.2.2), POST and PATCH are not.
    methods: Annotated[tuple[str, ...], list_of(parse_method)] = Field(
        ("POST", "PATCH"), description="Comma list of the guarded methods, from POST, PATCH, PUT and DELETE."
    )
    key_header: Annotated[str, from_text(parse_key_header)] = Field(
        "Idempotency-Key", description="Header that carries the key."
    )
    key_required: bool = Field(False, description="Answer 400 to a request with a guarded method and no key.")
    scope_headers: Annotated[tuple[str, ...], list_of(parse_scope)] = Field(
        (KNOWN,),
        description="Comma list of the headers that identify the tenant. Two tenants can use the same key. `known`: "
        "[those that oncegate knows](headers.md#credentials-and-accounts).",
    )
    stable_schemes: Annotated[tuple[str, ...], list_of(parse_scheme)] = Field(
        (),
        description="Comma list of further [schemes of `Authorization`](headers.md#schemes-of-authorization) whose "
        "credential is the same in a retry. Others than `Basic`, `Bearer`, `Token` and `ApiKey` get 400 otherwise.",
    )
    retention_s: Seconds = Field(
        86_400,
        description="How long oncegate replays a response, counted from its completion. Choose more than the longest "
        "time for which your clients retry.",
    )
    unknown_retention_s: SecondsOrForever = Field(
        90 * 86_400,
        description="How long oncegate refuses a key whose outcome is unknown, with `ONCEGATE_ON_UNKNOWN=hold`. After "
        "that time a retry executes. 0: for ever. A shorter time than the rule's retention counts as that retention. "
        "Derived keys always keep `ONCEGATE_RETENTION_S`.",
    )
    tombstone_s: SecondsOrZero = Field(
        0,
        description="How long oncegate refuses a key after its retention: a retry gets 410 `key-expired` and is not "
        "executed. The response is dropped, and the status and the time stay. Derived keys have no such time.",
    )
    lease_ms: int = Field(
        10_000,
        ge=200,
        le=DAY_MS,
        description="Lease of a claim. oncegate renews it after a third of that time. If a proxy dies, its unfinished "
        "requests become unknown after one lease.",
    )
    on_duplicate: Literal["reject", "wait", "join"] = Field(
        "reject",
        description="What a duplicate gets while the original is running. `reject`: 409. `wait`: the response of the "
        "original once that is complete, or 409 after `ONCEGATE_WAIT_MAX_S`. `join`: the response while it comes; it "
        "waits as long for its beginning. "
        "[Which to choose](rules.md#while-the-original-is-running).",
    )
    wait_max_s: Seconds = Field(
        30,
        description="Longest wait of a duplicate, with `ONCEGATE_ON_DUPLICATE=wait` or `Prefer: wait`. "
        "With `join`, the longest wait for the beginning of the response.",
    )
    max_waiters: int = Field(
        1024,
        ge=0,
        le=MILLION,
        description="Duplicates that wait at the same time, for each worker, and at most 64 for one key. Others get "
        "409 at once.",
    )
    max_followers: int = Field(
        1024,
        ge=0,
        le=MILLION,
        description="Duplicates that join a running original at the same time, for each worker. One tenant has a "
        "quarter of the places at most. Others wait for the end. 0: nobody joins.",
    )
    on_unknown: Literal["hold", "retry"] = Field(
        "hold",
        description="What happens to a retry if the outcome of the original is unknown. `hold`: oncegate does not "
        "execute it for `ONCEGATE_UNKNOWN_RETENTION_S` (at most once). `retry`: oncegate executes it (at least once).",
    )
    release_statuses: Annotated[tuple[str, ...], list_of(parse_status)] = Field(
        (DEFAULT,),
        description="Comma list of the [statuses](rules.md#statuses) by which your API says that it executed nothing: "
        "they free the key. `default`: 307, 308, 401, 421, 425 and 429. Add `503+retry-after` if no gateway answers "
        "for your API.",
    )

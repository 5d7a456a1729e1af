"""SIGHUP: what files say is read again and checked together, then taken over together; nothing else changes."""

import asyncio
import os
import signal
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from tests.e2e.test_workers import Load, workers
from tests.parts import OK, RawClient, RawUpstream, Tap, answering, ask, request, until


def write_certificate(folder: Path, authority: trustme.CA, *names: str, prefix: str = "") -> tuple[Path, Path]:
    """Write a certificate and its key where a proxy finds them, and return their files."""
    made = authority.issue_cert(*(names or ("localhost",)))
    cert, key = folder / f"{prefix}cert.pem", folder / f"{prefix}key.pem"
    made.private_key_pem.write_to_path(key)
    cert.write_bytes(b"".join(pem.bytes() for pem in made.cert_chain_pems))
    return cert, key


async def presented(port: int, authority: trustme.CA) -> bytes:
    """Return the certificate that a new connection gets."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    client = await RawClient.open(port, ssl=context, server_hostname="localhost")
    certificate = client.writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    client.close()
    return certificate


async def end(upstream: RawUpstream) -> None:
    """Close an upstream without waiting for the other side of TLS."""

    def is_over() -> bool:
        for writer in upstream.writers:
            writer.transport.abort()
        # Counts connections whose handshake is not over, too, of which no writer knows.
        return not upstream.writers and not upstream.open_connections

    is_over()
    await upstream.close()
    await until(is_over)


async def hang_up(proxy, event: str = "reloaded", count: int = 1) -> dict:
    """Send SIGHUP and return the `count`th line of an event."""
    proxy.signal(signal.SIGHUP)
    await until(lambda: len(proxy.events(event)) >= count)
    return proxy.events(event)[count - 1]


async def test_a_new_certificate_and_all_or_nothing(proxies, upstream, valkey, tmp_path):
    """New connections get it, open ones go on. With a mistake in one file, nothing of any file is taken over."""
    authority = trustme.CA()
    cert, key = write_certificate(tmp_path, authority)
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\n')
    proxy = proxies(upstream, valkey.url, TLS_CERT_FILE=cert, TLS_KEY_FILE=key, RULES_FILE=rules)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    open_one = await RawClient.open(proxy.port, ssl=context, server_hostname="localhost")
    assert (await open_one.ask(request(key="k1"))).status == 200
    first = await presented(proxy.port, authority)
    started = proxy.metric("config_last_reload_success_timestamp_seconds")

    write_certificate(tmp_path, authority)
    rules.write_text('[[rule]]\nname = "b"\n')
    line = await hang_up(proxy)
    assert line["rules"] == ["b"]
    assert sorted(line["files"]) == ["ONCEGATE_RULES_FILE", "ONCEGATE_TLS_CERT_FILE", "ONCEGATE_TLS_KEY_FILE"]
    second = await presented(proxy.port, authority)
    assert second != first
    assert (await open_one.ask(request(key="k2"))).status == 200
    reloaded = proxy.metric("config_last_reload_success_timestamp_seconds")
    assert reloaded > started
    assert proxy.metric("config_last_reload_failure_timestamp_seconds") == 0

    # A pair of which one file is new, beside rules that are good.
    good_key = key.read_bytes()
    write_certificate(tmp_path, authority)
    key.write_bytes(good_key)
    rules.write_text('[[rule]]\nname = "c"\n')
    refused = "reload refused, nothing changed"
    assert "KEY_VALUES_MISMATCH" in str((await hang_up(proxy, refused))["reasons"])
    assert await presented(proxy.port, authority) == second
    assert proxy.metric("config_last_reload_success_timestamp_seconds") == reloaded
    assert proxy.metric("config_last_reload_failure_timestamp_seconds") > reloaded

    # Rules with a mistake, beside a certificate that is good.
    write_certificate(tmp_path, authority)
    rules.write_text('[[rule]]\nname = "c"\npath = "c"\n')
    assert "path" in str((await hang_up(proxy, refused, 2))["reasons"])
    key.unlink()
    assert [text.partition(":")[0] for text in (await hang_up(proxy, refused, 3))["reasons"]] == [
        "ONCEGATE_TLS_KEY_FILE"
    ]
    assert await presented(proxy.port, authority) == second
    assert (await open_one.ask(request(key="k3"))).status == 200
    assert [line["rules"] for line in proxy.events("reloaded")] == [["b"]]
    open_one.close()


async def test_new_certificates_towards_the_upstream(proxies, valkey, tmp_path):
    """A new authority and a new client certificate count for the requests that come from then on."""
    authority, client_authority = trustme.CA(), trustme.CA()

    def tls_of(server_ca: trustme.CA, client_ca: trustme.CA) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        server_ca.issue_cert("127.0.0.1").configure_cert(context)
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca)
    cert, key = write_certificate(tmp_path, client_authority, "oncegate")
    upstream = RawUpstream()
    upstream.script = answering(OK)
    await upstream.start(tls=tls_of(authority, client_authority))
    settings = {"UPSTREAM_CA_FILE": ca, "UPSTREAM_CERT_FILE": cert, "UPSTREAM_KEY_FILE": key}
    url = upstream.url.replace("http:", "https:")
    proxy = proxies(url, valkey.url, CONNECT_RETRIES=0, UPSTREAM_REST_S=0, UPSTREAM_REUSE_IDLE_S=60, **settings)
    assert (await ask(proxy.port, request(key="k1"))).status == 200
    port = upstream.port
    await end(upstream)

    # Everything is new over there.
    authority, client_authority = trustme.CA(), trustme.CA()
    second = RawUpstream()
    second.script = answering(OK)
    await second.start(socket.create_server(("127.0.0.1", port)), tls_of(authority, client_authority))
    assert (await ask(proxy.port, request(key="k2"))).status == 502
    authority.cert_pem.write_to_path(ca)
    write_certificate(tmp_path, client_authority, "oncegate")
    await hang_up(proxy)
    assert (await ask(proxy.port, request(key="k2"))).status == 200
    assert (await ask(proxy.port, request(key="k3"))).status == 200
    assert len(second.received) == 2
    connections = {one.connection for one in second.received}
    await hang_up(proxy, count=2)
    assert (await ask(proxy.port, request(key="k4"))).status == 200
    assert {one.connection for one in second.received} == connections, "the same files change no pool"
    await end(second)


async def test_other_settings_need_a_restart(proxies, upstream, valkey, tmp_path):
    """Each is named in a warning, and keeps its value; a mistake in `.env` changes nothing."""
    rules, env, secret = tmp_path / "rules.toml", tmp_path / ".env", tmp_path / "secret"
    rules.write_text('[[rule]]\nname = "a"\n')
    env.write_text("ONCEGATE_RETENTION_S=60\n")
    secret.write_text("the secret of before")
    proxy = proxies(upstream, valkey.url, RULES_FILE=rules, SECRET_FILE=secret)
    env.write_text("ONCEGATE_RETENTION_S=90\nONCEGATE_HOSTS=api.example\nONCEGATE_MIGRATE_URL=postgresql://a@b/c\n")
    secret.write_text("the secret of after")
    rules.write_text('[[rule]]\nname = "b"\n')
    assert (await hang_up(proxy))["rules"] == ["b"]
    changed = {"ONCEGATE_RETENTION_S", "ONCEGATE_HOSTS", "ONCEGATE_SECRET"}
    await until(lambda: len(proxy.events("changed setting needs a restart")) == len(changed))
    assert {line["setting"] for line in proxy.events("changed setting needs a restart")} == changed
    assert "secret of" not in proxy.log()
    assert (await ask(proxy.port, request())).status == 200, "every host is served"
    with valkey.client() as client:
        (name,) = client.scan_iter("once:{*")
        assert client.pttl(name) <= 60_000

    env.write_text("ONCEGATE_RETENTION_S=soon\nONCEGATE_RETENTION=1\n")
    rules.write_text('[[rule]]\nname = "c"\n')
    reasons = (await hang_up(proxy, "reload refused, nothing changed"))["reasons"]
    assert [reason.partition(":")[0] for reason in reasons] == ["ONCEGATE_RETENTION", "ONCEGATE_RETENTION_S"]
    assert len(proxy.events("reloaded")) == 1


async def test_the_password_of_the_store(proxies, upstream, own_valkey, tmp_path):
    """A new password counts once the store has taken it, for connections to come; requests in flight settle."""
    password, rules = tmp_path / "password", tmp_path / "rules.toml"
    password.write_text("one\n")
    rules.write_text('[[rule]]\nname = "a"\n')
    with own_valkey.client() as client:
        client.execute_command("ACL", "SETUSER", "gate", "on", ">one", "~*", "&*", "+@all")
        url = own_valkey.url.replace("://", "://gate@")
        proxy = proxies(upstream, url, STORE_PASSWORD_FILE=password, RULES_FILE=rules)
        tap = Tap()
        upstream.script = tap.script
        running = asyncio.ensure_future(ask(proxy.port, request(key="running")))
        await until(lambda: upstream.received)

        rules.write_text('[[rule]]\nname = "b"\n')
        password.write_text("two\n")
        refused = await hang_up(proxy, "reload refused, nothing changed")
        assert "invalid username-password" in str(refused["reasons"])
        assert not proxy.events("reloaded")

        client.execute_command("ACL", "SETUSER", "gate", ">two")
        assert (await hang_up(proxy))["rules"] == ["b"]
        assert len(proxy.events("store credentials replaced")) == 1
        client.execute_command("ACL", "SETUSER", "gate", "<one")
        client.execute_command("CLIENT", "KILL", "USER", "gate", "SKIPME", "yes")
        tap.end(OK)
        assert (await running).header("oncegate-status") == b"executed"
        upstream.script = answering(OK)
        assert (await ask(proxy.port, request(key="next"))).header("oncegate-status") == b"executed"
        assert (await ask(proxy.port, request(key="running"))).header("oncegate-status") == b"replayed"
    assert "two" not in proxy.log()
    assert await asyncio.to_thread(proxy.stop) == 0


async def test_the_log_level_of_the_env_file(proxies, upstream, valkey, tmp_path):
    """It counts for the lines of requests, too."""
    env = tmp_path / ".env"
    env.write_text("ONCEGATE_LOG_LEVEL=info\n")
    proxy = proxies(upstream, valkey.url)
    assert (await ask(proxy.port, request(key="k1"))).status == 200
    await until(lambda: len(proxy.events("request")) == 1)
    env.write_text("ONCEGATE_LOG_LEVEL=error\n")
    started = proxy.metric("config_last_reload_success_timestamp_seconds")
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.metric("config_last_reload_success_timestamp_seconds") > started)
    assert (await ask(proxy.port, request(key="k2"))).status == 200
    env.write_text("ONCEGATE_LOG_LEVEL=info\n")
    await hang_up(proxy)
    assert (await ask(proxy.port, request(key="k3"))).status == 200
    await until(lambda: len(proxy.events("request")) == 2)


async def test_workers_say_which_files_they_took(proxies, upstream, valkey, tmp_path):
    """A file with a mistake reaches no worker. A worker that started with another file is noticed."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\n')
    proxy = proxies(upstream, valkey.url, WORKERS=2, RULES_FILE=rules)
    assert proxy.admin("/readyz")[1].count("different versions") == 0

    rules.write_text("[[rule]]\n")
    await hang_up(proxy, "reload refused, nothing changed")
    assert proxy.metric("config_last_reload_failure_timestamp_seconds") > 0

    (tmp_path / ".env").write_text("ONCEGATE_RETENTION_S=60\n")
    rules.write_text('[[rule]]\nname = "b"\n')
    os.kill(workers(proxy)[0], signal.SIGKILL)
    await until(lambda: "different versions" in proxy.admin("/readyz")[1], 30)
    await until(lambda: proxy.admin("/readyz")[0] == 200)
    await hang_up(proxy, count=2)
    first, second = proxy.events("reloaded")
    assert first["files"] == second["files"]
    assert {first["worker"], second["worker"]} == {1, 2}
    assert "different versions" not in proxy.admin("/readyz")[1]
    assert len(proxy.events("changed setting needs a restart")) == 1, "the supervisor alone says it"
    assert len(proxy.events("reload refused, nothing changed")) == 1


async def test_a_path_with_a_key_stays_unsaid_over_a_reload(proxies, upstream, valkey, tmp_path):
    """A request that is under way while its rule goes is logged without its path, as it came under the rule."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "hooks"\npath = "/hooks/*"\nkey = "path:2"\n')
    proxy = proxies(upstream, valkey.url, RULES_FILE=rules)
    tap = Tap()
    upstream.script = tap.script
    running = asyncio.ensure_future(ask(proxy.port, request("POST", "/hooks/s3cr3t", None, b"{}")))
    await until(lambda: upstream.received)
    rules.write_text('[[rule]]\nname = "other"\n')
    proxy.signal(signal.SIGHUP)
    await until(lambda: proxy.events("reloaded"))
    tap.end(OK)
    assert (await running).status == 200
    await until(lambda: proxy.events("request"))
    assert "s3cr3t" not in proxy.log()


@pytest.mark.parametrize("count", [1, 2])
async def test_reloads_lose_no_request(proxies, upstream, valkey, tmp_path, count):
    """Thirty reloads under load, good and bad files in turn: every request has its answer."""
    rules = tmp_path / "rules.toml"
    rules.write_text('[[rule]]\nname = "a"\n')
    upstream.script = answering(OK, 0.005)
    proxy = proxies(upstream, valkey.url, WORKERS=count, RULES_FILE=rules, ACCESS_LOG="off")
    load = Load(proxy.port, 4)
    for number in range(10):
        for event, text in (("reloaded", f'name = "a{number}"'), ("reload refused, nothing changed", "name = 1")):
            rules.write_text(f"[[rule]]\n{text}\n")
            await hang_up(proxy, event, (number + 1) * (count if event == "reloaded" else 1))
    await load.end()
    assert load.broken == {}
    assert load.answered

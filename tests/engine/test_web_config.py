"""The exporter-toolkit web configuration, for both programs: TLS, client certificates, rotation."""

import asyncio
import contextlib
import ipaddress
import socket
import ssl
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import bcrypt
import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from exporter.web import Listener, WebConfigError, loopback
from exporter.web_config import TlsConfig, load, peer_names, spelt, tls_context
from tests.engine.support import alert, message, running


class Authority:
    """A certificate authority that writes PEM files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.file = folder / f"{name}.pem"
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        made = self._builder(self._name, self._key.public_key()).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.file.write_bytes(
            made.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        )

    def issue(self, name: str, san: str = "") -> int:
        """Write `name.crt` and `name.key`; the serial."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        names: list[x509.GeneralName] = [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        if san:
            names.append(x509.DNSName(san))
        builder = self._builder(subject, key.public_key()).add_extension(
            x509.SubjectAlternativeName(names), critical=False
        )
        made = builder.sign(self._key, hashes.SHA256())
        pem = serialization.Encoding.PEM
        (self.folder / f"{name}.crt").write_bytes(made.public_bytes(pem))
        (self.folder / f"{name}.key").write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return made.serial_number

    def _builder(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(hours=1))
        )


@contextlib.asynccontextmanager
async def listening(config: Path) -> AsyncIterator[Listener]:
    async def hello(_request: web.Request) -> web.Response:
        return web.Response(text="hello")

    app = web.Application()
    app.router.add_get("/", hello)
    listener = Listener(app, ("127.0.0.1", 0), config)
    await listener.start()
    try:
        yield listener
    finally:
        await listener.aclose()


def client(authority: Authority, certificate: str = "") -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(authority.file))
    if certificate:
        folder = authority.folder
        context.load_cert_chain(folder / f"{certificate}.crt", folder / f"{certificate}.key")
    return context


async def ask(listener: Listener, context: ssl.SSLContext) -> int:
    """The status of one answer over a new connection."""
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"https://127.0.0.1:{listener.port}/", ssl=context) as response,
    ):
        return response.status


async def served(listener: Listener, context: ssl.SSLContext) -> int:
    """Serial number of what is served."""
    _, writer = await asyncio.open_connection("127.0.0.1", listener.port, ssl=context)
    tls = writer.get_extra_info("ssl_object")
    found = x509.load_der_x509_certificate(tls.getpeercert(binary_form=True)).serial_number
    writer.close()
    return found


TLS = """
tls_server_config:
  cert_file: server.crt
  key_file: server.key
  client_auth_type: RequireAndVerifyClientCert
  client_ca_file: clients.pem
"""


async def test_client_certificates_are_demanded_and_their_names_too(tmp_path: Path) -> None:
    authority, clients = Authority(tmp_path, "ca"), Authority(tmp_path, "clients")
    stranger = Authority(tmp_path, "strangers")
    authority.issue("server")
    clients.issue("alertmanager", "alertmanager.example")
    clients.issue("other", "other.example")
    stranger.issue("stranger")
    config = tmp_path / "web.yml"
    config.write_text(f"{TLS}  client_allowed_sans: [alertmanager.example]\n")
    async with listening(config) as listener:
        assert listener.guarded
        assert await ask(listener, client(authority, "alertmanager")) == 200
        assert await ask(listener, client(authority, "other")) == 403
        for bad in ("", "stranger"):
            with pytest.raises(aiohttp.ClientError):
                await ask(listener, client(authority, bad))


async def test_certificates_and_client_authorities_rotate_without_a_restart(tmp_path: Path) -> None:
    authority, clients = Authority(tmp_path, "ca"), Authority(tmp_path, "clients")
    before = authority.issue("server")
    clients.issue("old")
    config = tmp_path / "web.yml"
    config.write_text(TLS)
    async with listening(config) as listener:
        assert await served(listener, client(authority, "old")) == before
        kept, writer = await asyncio.open_connection(
            "127.0.0.1", listener.port, ssl=client(authority, "old")
        )
        writer.write(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await kept.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        newer = Authority(tmp_path, "clients")  # the same file, another authority
        newer.issue("new")
        after = authority.issue("server")
        ends = time.monotonic() + 30
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                if await ask(listener, client(authority, "new")) == 200:
                    break
            assert time.monotonic() < ends
            await asyncio.sleep(0.3)
        assert await served(listener, client(authority, "new")) == after
        with pytest.raises(aiohttp.ClientError):
            await ask(listener, client(authority, "old"))
        # Nor does a connection stay that the old authority let in.
        assert await asyncio.wait_for(kept.read(), 10) == b""
        # Files that can't be used leave what is in force.
        (tmp_path / "server.key").write_text("half a key")
        with pytest.raises(WebConfigError, match=r"server\.key"):
            await listener.reload()
        assert await ask(listener, client(authority, "new")) == 200


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("basic_auth_user: {}", r"yml:1: basic_auth_user: no such option; .* basic_auth_users"),
        ("\ntls_server_config:\n  cert: x", "yml:3: tls_server_config.cert: no such option; .* c"),
        ("rate_limit: {burst: 1}", "rate_limit: no such option"),
        ("basic_auth_users:\n  ada: x\nbasic_auth_users: {}", "yml:3: .*twice"),
        ("tls_server_config:\n  client_auth_type: a\n  client_auth_type: b", "yml:3: .*twice"),
        ('http_server_config:\n  headers:\n    X-A: "a\\r\\nX-B: b"', "yml:3: .*no header"),
        ("http_server_config: {headers: {X A: b}}", "no header"),
        ("http_server_config: {headers: {X-A: 1}}", "yml:1: .*headers: Expected `str`"),
        (
            "tls_server_config: {cert_file: a, key_file: b, min_version: TLS13,max_version: TLS12}",
            "no version is between",
        ),
        ("basic_auth_users: {ada: secret}", "bcrypt"),
        ("tls_server_config: {cert_file: a}", "both"),
        ("tls_server_config: {cert_file: a, key_file: b}", "is no file"),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequestClientCert}",
            "can't be had",
        ),
        (
            "tls_server_config: {cert_file: a, key_file: b, client_ca_file: c}",
            "go together",
        ),
        ("tls_server_config: {cert_file: a, key_file: b, min_version: TLS10}", "TLS12"),
        ("a: [", "not YAML"),
        ("7", "Expected"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "web.yml"
    config.write_text(text)
    with pytest.raises(WebConfigError, match=words) as raised:
        Listener(web.Application(), ("127.0.0.1", 0), config).load()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("suite", "found"),
    [
        ("TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256", "ECDHE-RSA-AES128-GCM-SHA256"),
        ("TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA", "ECDHE-ECDSA-AES256-SHA"),
        ("TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA256", "ECDHE-RSA-AES128-SHA256"),
        ("TLS_RSA_WITH_AES_128_CBC_SHA", "AES128-SHA"),
        ("TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256", "ECDHE-RSA-CHACHA20-POLY1305"),
        ("TLS_AES_128_GCM_SHA256", ""),
        ("TLS_ECDHE_RSA_WITH_AES_129_GCM_SHA256", ""),
        ("ALL", ""),
    ],
)
def test_a_cipher_suite_is_had_or_refused_by_its_name(
    tmp_path: Path, suite: str, found: str
) -> None:
    Authority(tmp_path, "ca").issue("server")
    known = "TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384"
    wanted = TlsConfig(cert_file="server.crt", key_file="server.key", cipher_suites=(known, suite))
    if not found:
        with pytest.raises(WebConfigError, match=f"cipher_suites: {suite} is no suite"):
            tls_context(wanted, tmp_path)
        return
    had = [cipher["name"] for cipher in tls_context(wanted, tmp_path).get_ciphers()]
    assert [name for name in had if not name.startswith("TLS_")] == [
        "ECDHE-ECDSA-AES256-GCM-SHA384",
        found,
    ]


def test_an_address_among_the_names_of_clients_has_one_spelling() -> None:
    decoded = {"subjectAltName": (("IP Address", "0:0:0:0:0:0:0:1"), ("DNS", "a.example"))}
    assert [spelt(name) for name in ("::1", "a.example")] == peer_names(decoded)


def test_an_empty_file_asks_for_nothing(tmp_path: Path) -> None:
    config = tmp_path / "web.yml"
    config.write_text("")
    assert load(config).basic_auth_users == {}


def test_what_is_loopback() -> None:
    assert all(map(loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(loopback, ("", "0.0.0.0", "::", "10.0.0.1", "example.org")))
    assert not any(map(loopback, ("127.0.0.1.example.org", "0", "127.1", "::ffff:10.0.0.1")))


def test_localhost_is_what_it_resolves_to(monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: elsewhere)
    assert not loopback("localhost")


async def test_e55_out_of_file_descriptors_it_does_not_fill_the_disk_with_that(
    tmp_path: Path,
) -> None:
    """Far more clients that say nothing than there are descriptors: told once a second, and one
    that asks is answered soon, for half of the descriptors are not for connections."""
    async with running(tmp_path, prefix=("prlimit", "--nofile=100:100")) as daemon:
        silent = [await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(150)]
        begun = time.monotonic()
        assert (await daemon.post(message(alert("web-1"))))[0] == 200
        assert time.monotonic() - begun < 12  # before the silent ones' time is up
        assert "out of system resource" in daemon.log()
        assert len(daemon.log()) < 100_000
        for _, writer in silent:
            writer.close()


async def test_e55_of_too_many_connections_those_go_that_never_asked(tmp_path: Path) -> None:
    async with running(tmp_path, config={"webhook": {"max_connections": 8}}) as daemon:
        known, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
        ask = b"GET /-/healthy HTTP/1.1\r\nHost: a\r\n\r\n"
        writer.write(ask)
        await known.readuntil(b"healthy.\n")
        await asyncio.sleep(0.1)  # so that all the others are idle for a shorter time
        silent = [await asyncio.open_connection("127.0.0.1", daemon.port) for _ in range(20)]
        async with asyncio.timeout(12):  # before their time is up anyway
            while sum(reader.at_eof() for reader, _ in silent) < 13:
                await asyncio.sleep(0.1)
        writer.write(ask)
        async with asyncio.timeout(5):
            assert await known.readuntil(b"healthy.\n")


async def test_e55_a_handshake_that_never_ends_ends_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.web_site._HANDSHAKE", 1.0)
    Authority(tmp_path, "ca").issue("server")
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: server.crt, key_file: server.key}")
    async with listening(config) as listener:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        async with asyncio.timeout(10):
            assert await reader.read() == b""
        writer.close()


async def test_e55_who_does_not_read_the_answer_is_hung_up_on() -> None:
    async def much(_request: web.Request) -> web.Response:
        return web.Response(body=bytes(20 << 20))

    app = web.Application()
    app.router.add_get("/", much)
    listener = Listener(app, ("127.0.0.1", 0), idle_timeout=1.0)
    await listener.start()
    try:
        with socket.create_connection(("127.0.0.1", listener.port)) as silent:
            silent.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            while not listener._connections():
                await asyncio.sleep(0.05)
            async with asyncio.timeout(20):
                while listener._connections():
                    await asyncio.sleep(0.1)
    finally:
        await listener.aclose()


@pytest.mark.parametrize(
    ("host", "text", "warned"),
    [
        ("0.0.0.0", "basic_auth_users: {{a: {}}}", True),
        ("127.0.0.1", "basic_auth_users: {{a: {}}}", False),
        ("0.0.0.0", "", False),
    ],
)
async def test_a_password_that_crosses_the_network_unencrypted_is_said(
    tmp_path: Path, host: str, text: str, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "web.yml"
    config.write_text(text.format(bcrypt.hashpw(b"x", bcrypt.gensalt(4)).decode()))
    listener = Listener(web.Application(), (host, 0), config)
    await listener.start()
    await listener.aclose()
    said = capsys.readouterr()
    assert ("unencrypted" in said.out + said.err) is warned

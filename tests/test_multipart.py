"""Keys in multipart forms: which values are read, which forms are refused, and what a hostile form costs."""

import time
from email.mime.multipart import MIMEMultipart
from email.mime.text import MIMEText

import aiohttp
import pytest
import requests

from oncegate.keys.documents import MAX_FIELDS, MAX_VALUE_BYTES, Missing
from oncegate.keys.multipart import MAX_PART_HEAD_BYTES, multipart_value
from oncegate.keys.syntax import BadKey

TYPE = b"multipart/form-data; boundary=XyZ"


def part(head: bytes, value: bytes = b"v") -> bytes:
    return b"--XyZ\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


def named(disposition: bytes, value: bytes = b"v") -> bytes:
    return part(b"Content-Disposition: form-data; " + disposition, value)


TOKEN = named(b'name="token"', b"a 1")
TYPED = b'Content-Disposition: form-data; name="token"\r\n'
FILE = part(
    b'Content-Disposition: form-data; name="f"; filename="a.png"\r\nContent-Type: image/png', b"\x89\r\n\x00--XyZ"
)
OTHER = b"Content-Disposition: form-data; name=f\r\n\r\nv"
END = b"--XyZ--\r\n"


def read(body: bytes, content_type: bytes = TYPE, name: bytes = b"token") -> bytes | Missing | BadKey:
    return multipart_value(content_type, body, name)


VALUES = {
    "alone": (TOKEN + END, b"a 1"),
    "after a file": (FILE + TOKEN + END, b"a 1"),
    "before a file": (TOKEN + FILE + END, b"a 1"),
    "other spellings": (part(b'content-DISPOSITION:form-data ;x=y;NAME=token\r\nX:', b"a") + END, b"a"),
    "a file's name with escapes": (named(rb'filename="a\"; name=\"token"; name="f"') + TOKEN + END, b"a 1"),
    "its type": (part(TYPED + b"Content-Type: text/plain", b"\xe4") + END, b"\xe4"),
    "as it is": (part(TYPED + b"Content-Transfer-Encoding: 8BIT", b"=31") + END, b"=31"),
    "lines in it": (named(b'name="token"', b"\r\na\r\n--Xy\r\n") + END, b"\r\na\r\n--Xy\r\n"),
    "a preamble and an epilogue": (b"a\r\n" + TOKEN + b"--XyZ-- \t\r\nb", b"a 1"),
    "a boundary within a line": (named(b'name="a"', b"\r\n.--XyZ\r\n") + TOKEN + END, b"a 1"),
    "a file that is a form": (FILE.replace(b"image/png", b"multipart/x") + TOKEN + END, b"a 1"),
    "padding": (TOKEN.replace(b"XyZ", b"XyZ \t") + b"--XyZ--", b"a 1"),
    "the longest": (named(b'name="token"', b"x" * MAX_VALUE_BYTES) + END, b"x" * MAX_VALUE_BYTES),
    "the most": (named(b'name="a"') * (MAX_FIELDS - 1) + TOKEN + END, b"a 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", VALUES)
def test_a_field(case):
    """The value is that of the one part with this name that is not a file, byte for byte."""
    body, value = VALUES[case]
    assert read(body) == value


@pytest.mark.parametrize(
    "body",
    [END, FILE + END, named(b'name="Token"') + END, named(b'name="token"', b"") + END, named(b'name=""') + END],
    ids=["nothing", "a file", "another", "empty", "no name"],
)
def test_a_form_without_the_field(body):
    """An absent or empty field counts as missing, not as a bad key."""
    assert isinstance(read(body), Missing)


BAD = {
    "twice": TOKEN + TOKEN + END,
    "twice, once as a file": TOKEN + named(b'name="token"; filename="a"') + END,
    "a file": named(b'name="token"; filename=""') + END,
    "a file with a coded name": named(b"name=\"token\"; filename*=utf-8''a") + END,
    "too long": named(b'name="token"', b"x" * (MAX_VALUE_BYTES + 1)) + END,
    "no end": TOKEN,
    "cut in the last line": TOKEN + b"--XyZ-",
    "text after the end": TOKEN + b"--XyZ--x\r\n",
    "a part after the end": TOKEN + END + FILE + END,
    "nothing of a form": b"token=1",
    "empty": b"",
    "a line that begins like a boundary": named(b'name="token"', b"a\r\n--XyZa\r\n" + OTHER) + END,
    "more after the end": TOKEN + END + OTHER + b"\r\n" + END,
    "a part without a head": b"--XyZ\r\n\r\nv\r\n" + TOKEN + END,
    "a head without an end": b"--XyZ\r\nContent-Disposition: form-data; name=token\r\n" + END,
    "another disposition": part(b'Content-Disposition: attachment; name="token"') + END,
    "no disposition": part(b"Content-Type: text/plain") + TOKEN + END,
    "two dispositions": part(b"Content-Disposition: form-data; name=a\r\n" * 2 + b"X: y") + END,
    "two names": named(b"name=token; name=token") + END,
    "a name with an escape": named(rb'name="to\ken"') + TOKEN + END,
    "a quote too many": named(b'name="token""') + END,
    "a quote too few": named(b'name="token') + END,
    "a folded head": part(b'Content-Disposition: form-data;\r\n name="token"') + END,
    "a space before the colon": part(b'Content-Disposition : form-data; name="token"') + END,
    "no colon": part(TYPED + b"x") + END,
    "encoded": part(TYPED + b"Content-Transfer-Encoding: base64", b"YQ==") + END,
    "a boundary behind LF": named(b'name="a"', b"a\n--XyZ\n" + TYPED + b"\r\nb") + TOKEN + END,
    "a boundary behind CR": named(b'name="a"', b"a\r--XyZ\r\n" + TYPED + b"\r\nb") + TOKEN + END,
    "a boundary behind LF at the beginning": b"\n--XyZ\n" + TYPED + b"\r\nb\r\n" + TOKEN + END,
    "a boundary behind LF after the end": TOKEN + END + b"\n--XyZ\n" + TYPED + b"\r\nb",
    "LF in a head": part(b"X: y\n" + TYPED + b'Content-Disposition: form-data; name="a"') + TOKEN + END,
    "CR in a head": part(b"X: y\r" + TYPED + b'Content-Disposition: form-data; name="a"') + TOKEN + END,
    "a head that LF ends": part(TYPED + b"X: y\n\nb") + END,
    "NUL in a head": named(b'name="token\0a"') + TOKEN + END,
    "a coded name": named(b"name=a; name*=utf-8''token") + TOKEN + END,
    "a name in parts": named(b"name=a; name*0=to; name*1=ken") + TOKEN + END,
    "a file with a name in parts": named(b"name=token; filename*0=a") + END,
    "a name in single quotes": named(b"name='token'") + TOKEN + END,
    "a form in a form": part(TYPED + b"Content-Type: Multipart/mixed; boundary=a") + END,
    "lines of LF alone": TOKEN.replace(b"\r\n", b"\n") + END,
    "a long head": named(b'name="token"; x="%s"' % (b"y" * MAX_PART_HEAD_BYTES)) + END,
    "too many": named(b'name="a"') * MAX_FIELDS + TOKEN + END,
}


@pytest.mark.parametrize("case", BAD)
def test_a_form_that_is_no_key(case):
    """A form that is malformed, or that two parsers could read differently, yields a bad key."""
    found = read(BAD[case])
    assert isinstance(found, BadKey)
    assert "form" in found.detail or "field" in found.detail


@pytest.mark.parametrize(
    ("content_type", "usable"),
    [
        (b'multipart/form-data; boundary="XyZ"', True),
        (b"Multipart/Form-Data;charset=utf-8 ; BOUNDARY=XyZ;", True),
        (b"multipart/form-data", False),
        (b"multipart/form-data; boundary=", False),
        (b"multipart/form-data; boundary=XyZ; boundary=XyZ", False),
        (b"multipart/form-data; boundary=XyZ, boundary=a", False),
        (b'multipart/form-data; boundary="XyZ ', False),
        (b'multipart/form-data; boundary="XyZ "', False),
        (b"multipart/form-data; boundary=" + b"x" * 71, False),
        (b"multipart/form-data; x-boundary=a; boundary=XyZ", False),
        (b'multipart/form-data; x="Boundary=a"; boundary=XyZ', False),
        (b"multipart/form-data; boundary*=utf-8''a; boundary=XyZ", False),
        (b"multipart/form-data; boundary=X\xffZ", False),
    ],
)
def test_the_boundary(content_type, usable):
    """The boundary occurs once in the Content-Type, and is valid under RFC 2046."""
    assert read(TOKEN + END, content_type) == b"a 1" if usable else isinstance(read(TOKEN + END, content_type), BadKey)


FIELDS = {"token": 'ä"1', "other": "x"}


def by_requests() -> tuple[str, bytes]:
    files = {"photo": ('a"b;\n.png', b"\x00\r\n--", "image/png")}
    made = requests.Request("POST", "http://a.test", data=FIELDS, files=files).prepare()
    return made.headers["Content-Type"], made.body


def by_the_standard_library() -> tuple[str, bytes]:
    form = MIMEMultipart("form-data", boundary="==a b==")
    for name, value in FIELDS.items():
        field = MIMEText(value, _charset="utf-8", policy=form.policy.clone(cte_type="8bit"))
        field.replace_header("Content-Transfer-Encoding", "8bit")
        field.set_payload(value.encode().decode("ascii", "surrogateescape"))
        field.add_header("Content-Disposition", "form-data", name=name)
        form.attach(field)
    body = form.as_bytes(policy=form.policy.clone(linesep="\r\n", cte_type="8bit"))
    return 'multipart/form-data; boundary="==a b=="', body.partition(b"\r\n\r\n")[2]


async def by_aiohttp() -> tuple[str, bytes]:
    form = aiohttp.FormData()
    form.add_field("photo", b"\x00", filename="ä.png", content_type="image/png")
    for name, value in FIELDS.items():
        form.add_field(name, value)
    writer = form()
    return writer.headers["Content-Type"], await writer.as_bytes()


@pytest.mark.parametrize("writer", ["requests", "the standard library", "aiohttp"])
async def test_forms_as_clients_write_them(writer):
    """Forms of well-known HTTP clients can be read, though each writes heads and file names differently."""
    if writer == "aiohttp":
        content_type, body = await by_aiohttp()
    else:
        content_type, body = by_requests() if writer == "requests" else by_the_standard_library()
    assert read(body, content_type.encode()) == FIELDS["token"].encode()


HOSTILE = {
    "boundaries": b"--XyZ\r\n" * 130_000,
    "boundaries without lines": b"\r\n--XyZ" * 149_000,
    "parts": named(b"name=a") * 990 + b"x" * 900_000,
    "heads of spaces": part(b"Content-Disposition: form-data;" + b" " * 4000) * 250 + END,
    "heads of parameters": part(b"Content-Disposition: form-data; name=x" + b";a=b" * 990) * 250 + END,
    "heads of semicolons": part(b"Content-Disposition: form-data" + b" ; " * 1300) * 250 + END,
    "heads of escapes": part(b'Content-Disposition: form-data; name="' + b"\\a" * 2000) * 250 + END,
    "heads of colons": part(b":" * 4000) * 250 + END,
    "heads of lines": part(b"\r\n".join(b"%d:" % n for n in range(700))) * 250 + END,
    "one line": b"-" * 1_000_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_form_costs_bounded_time(case):
    """Reading a hostile MiB takes at most a few times as long as reading an ordinary one."""

    def took_s() -> float:
        begun = time.process_time()
        read(HOSTILE[case][:1_048_576])
        return time.process_time() - begun

    assert any(took_s() < 0.2 for _ in range(3)), "also on a busy machine"


def test_a_hostile_type_costs_bounded_time():
    """A hostile Content-Type of 64 KiB costs bounded time."""
    begun = time.process_time()
    for text in (b" " * 60_000, b"; a=b" * 12_000, b" ;" * 30_000, b'; a="' + b"\\a" * 30_000, b";a=" + b"!" * 60_000):
        read(TOKEN + END, b"multipart/form-data" + text)
    assert time.process_time() - begun < 0.2

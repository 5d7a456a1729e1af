"""Capabilities: what they say, and that nobody else can make or change one."""

import pytest

from oncegate.keys.digests import Digests
from oncegate.streams.capability import CANCEL, LATER, READ, Capabilities, Capability, rule_mark

KEY = Digests(b"a secret of sixteen").capability_key
ONE = Capability(READ, 1_800_000_000, b"k" * 24, b"t" * 16, b"o" * 16, rule_mark("llm"))


def test_a_capability_comes_back_as_it_was_written():
    capabilities = Capabilities(KEY)
    for purpose in (READ, CANCEL, LATER):
        text = capabilities.write(ONE._replace(purpose=purpose))
        assert len(text) == 108
        assert capabilities.read(text) == ONE._replace(purpose=purpose)
        assert capabilities.write(ONE._replace(purpose=purpose)) == text
    assert ONE.scope.tenant == ONE.tenant


def test_another_secret_makes_others():
    text = Capabilities(KEY).write(ONE)
    other = Capabilities(Digests(b"another secret of more").capability_key)
    assert other.read(text) is None
    assert other.write(ONE) != text


def test_no_character_can_be_changed():
    capabilities = Capabilities(KEY)
    text = capabilities.write(ONE)
    for at in range(len(text)):
        for other in {b"A", b"-", b"9"} - {text[at : at + 1]}:
            assert capabilities.read(text[:at] + other + text[at + 1 :]) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda text: b"",
        lambda text: text[:-1],
        lambda text: text[:-4],
        lambda text: text[4:],
        lambda text: text + b"A",
        lambda text: text + b"=",
        lambda text: text + b"\n",
        lambda text: text.replace(text[:1], b"+"),
        lambda text: b"%%%02x" % text[0] + text[1:],
        lambda text: text.swapcase(),
        lambda text: b" " + text,
    ],
)
def test_a_text_that_is_not_exactly_one_is_none(change):
    capabilities = Capabilities(KEY)
    assert capabilities.read(change(capabilities.write(ONE))) is None


def test_a_time_beyond_32_bits_is_the_last_there_is():
    capabilities = Capabilities(KEY)
    found = capabilities.read(capabilities.write(ONE._replace(expires_s=1 << 40)))
    assert found is not None
    assert found.expires_s == 0xFFFFFFFF


def test_without_a_secret_there_is_no_key():
    assert Digests(b"").capability_key == b""

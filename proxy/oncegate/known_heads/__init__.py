"""Heads of messages that came before. They serve speed alone: `ONCEGATE_HEAD_CACHE=false` switches all of this off.

Clients and upstreams repeat themselves on connections that are kept: request after request differs in nothing but its
key, or in a few values that nothing here acts on, such as a trace. HTTP/2 sends an index for what repeats (RFC 7541);
HTTP/1.1 sends it whole. Equal bytes are parsed and judged equally, so a look-up takes the place of the parser and of
every check that follows it.
"""

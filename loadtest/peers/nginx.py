"""nginx configurations: the bench's upstream, a plain proxy_pass, and the job in Lua."""

import os
from pathlib import Path

HERE = Path(__file__).parent
MODULES = Path("/usr/lib/nginx/modules")

FRAME = """\
{modules}
{user}
worker_processes {workers}; daemon off; pid {folder}/nginx.pid; error_log stderr error;
env STORE_HOST; env STORE_PORT;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 300s; client_max_body_size 64m;
  client_body_buffer_size 1m; lua_check_client_abort off;
  lua_package_path "{here}/?.lua;/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua;;";
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {http}
  server {{ listen 127.0.0.1:{port} backlog=4096 {reuse}; {server} }}
}}
"""

CHARGE = '{"id":"ch_3MmlLrLkdIwHu7ix0snN0B15","object":"charge","amount":2000,"currency":"usd","status":"succeeded"}'

# /hold answers after so long that its key is in flight meanwhile; /stream sends the file, whatever the method.
UPSTREAM = f"""
  default_type application/json;
  location / {{ return 200 '{CHARGE}'; }}
  location = /hold {{ content_by_lua_block {{ ngx.req.discard_body() ngx.sleep(tonumber(ngx.var.arg_s) or 1) ngx.print("{{}}") }} }}
"""

PASS = """
  location / {
    proxy_pass http://upstream; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
    proxy_buffering off; proxy_read_timeout 300s; proxy_next_upstream off; %s
  }
"""

ONCE = """
    access_by_lua_block { require("once").claim() }
    body_filter_by_lua_block { require("once").copy() }
    log_by_lua_block { require("once").store() }
    proxy_ignore_client_abort on;
"""


def config(folder: Path, port: int, server: str, upstream_port: int = 0, workers: int = 1) -> str:
    """Return a whole configuration whose one server listens on `port` of 127.0.0.1."""
    http = f"upstream upstream {{ server 127.0.0.1:{upstream_port}; keepalive 512; }}" if upstream_port else ""
    return FRAME.format(
        modules="\n".join(
            f"load_module {MODULES / name};" for name in ("ndk_http_module.so", "ngx_http_lua_module.so")
        ),
        user="user root;" if os.geteuid() == 0 else "",
        workers=workers,
        folder=folder,
        here=HERE,
        http=http,
        port=port,
        reuse="reuseport" if workers > 1 else "",
        server=server,
    )

"""nginx configurations: the bench's upstream, a plain proxy_pass, and the job in Lua."""

import os
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
MODULES = Path("/usr/lib/nginx/modules")
BIG_BYTES = 100_000_000

FRAME = """\
load_module {modules}/ndk_http_module.so; load_module {modules}/ngx_http_lua_module.so;
{user} daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
env STORE_HOST; env STORE_PORT;
events {{ worker_connections 8192; }}
http {{
  access_log off; sendfile on; keepalive_requests 1000000000; keepalive_timeout 300s; client_max_body_size 64m;
  client_body_buffer_size 1m; lua_check_client_abort off;
  lua_package_path "{here}/?.lua;/usr/share/lua/5.1/?.lua;/usr/share/lua/5.1/?/init.lua;;";
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  {upstream}
  server {{ listen 127.0.0.1:{port} backlog=4096; {server} }}
}}
"""

CHARGE = '{"id":"ch_3MmlLrLkdIwHu7ix0snN0B15","object":"charge","amount":2000,"currency":"usd","status":"succeeded"}'

# /api/ answers as real APIs do: each answer has an id of its own, and another length. /hold answers after so long that
# its key is in flight meanwhile; /big sends the file whatever the method.
UPSTREAM = f"""
  default_type application/json;
  location / {{ return 200 '{CHARGE}'; }}
  location /api/ {{ content_by_lua_block {{
    ngx.req.read_body()
    local size = ngx.var.uri:find("chat", 1, true) and math.random(1700, 2100) or math.random(10, 400)
    local body = '{{"id":"obj_' .. ngx.var.request_id .. '","text":"' .. ("lorem ipsum "):rep(200):sub(1, size) .. '"}}'
    local fields = ngx.header
    fields["Request-Id"], fields["X-Processing-Ms"] = "req_" .. ngx.var.request_id, math.random(10, 9999)
    fields["Cache-Control"], fields["Vary"] = "no-cache, no-store", "Origin"
    fields["Strict-Transport-Security"] = "max-age=63072000; includeSubDomains"
    fields["Content-Length"] = #body
    ngx.print(body)
  }} }}
  location = /hold {{ content_by_lua_block {{
    ngx.req.discard_body() ngx.sleep(tonumber(ngx.var.arg_s) or 1) ngx.print("{{}}")
  }} }}
  location = /big {{ content_by_lua_block {{
    ngx.req.discard_body() ngx.req.set_method(ngx.HTTP_GET) ngx.exec("/file")
  }} }}
  location = /file {{ internal; alias {{folder}}/big; }}
"""

PASS = """
  location / {
    proxy_pass http://upstream; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Host $host;
    proxy_read_timeout 300s; proxy_next_upstream off; %s
  }
"""

# Each answer as soon as it comes; or as fast as nginx can: without buffering it reads a page at a time.
AT_ONCE = "proxy_buffering off;"
IN_BULK = "proxy_buffers 16 64k; proxy_buffer_size 64k; proxy_busy_buffers_size 256k; proxy_max_temp_file_size 0;"

ONCE = (
    AT_ONCE
    + """
    access_by_lua_block { require("once").claim() }
    body_filter_by_lua_block { require("once").copy() }
    log_by_lua_block { require("once").store() }
    proxy_ignore_client_abort on;
"""
)


def prepare(port: int, server: str, upstream_port: int = 0) -> Path:
    """Return a new folder with a configuration whose one server listens on `port` of 127.0.0.1."""
    folder = Path(tempfile.mkdtemp(prefix="oncegate-bench-nginx-"))
    if "{folder}/big" in server:
        with (folder / "big").open("wb") as file:
            file.truncate(BIG_BYTES)
    text = FRAME.format(
        modules=MODULES,
        user="user root;" if os.geteuid() == 0 else "",
        folder=folder,
        here=HERE,
        port=port,
        upstream=f"upstream upstream {{ server 127.0.0.1:{upstream_port}; keepalive 512; }}" if upstream_port else "",
        server=server.replace("{folder}", str(folder)),
    )
    (folder / "nginx.conf").write_text(text)
    return folder

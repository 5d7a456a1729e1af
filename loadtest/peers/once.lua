-- The job in about a hundred lines of nginx + Lua: SET NX claims, a body filter copies the answer, a timer stores it
-- after it has been sent. No lease renewal, no fencing, no metrics, and a crash between answer and store loses it.
-- Redis is spoken to over nginx's own sockets. usage: access_by_lua_block { require("once").claim() } and so on.
local once = {}
local CLAIM_MS, KEEP_MS, LARGEST = 60000, 86400000, 16 * 1024 * 1024
local HOST, PORT = os.getenv("STORE_HOST"), tonumber(os.getenv("STORE_PORT"))
local STORE = [[
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
if ARGV[2] == '' then return redis.call('DEL', KEYS[1]) end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[3])
return 1]]
local NOT_STORED = { connection = true, date = true, server = true, ["content-length"] = true,
                     ["keep-alive"] = true, ["transfer-encoding"] = true, ["set-cookie"] = true }

local function redis(...)
  local socket = ngx.socket.tcp()
  socket:settimeout(1000)
  local connected, problem = socket:connect(HOST, PORT)
  if not connected then return nil, problem end
  local words, count = { ... }, select("#", ...)
  local wire = { "*", count, "\r\n" }
  for at = 1, count do
    local word = tostring(words[at])
    wire[#wire + 1] = "$" .. #word .. "\r\n"
    wire[#wire + 1] = word
    wire[#wire + 1] = "\r\n"
  end
  local sent, broken = socket:send(wire)
  if not sent then return nil, broken end
  local line, lost = socket:receive("*l")
  if not line then return nil, lost end
  local kind, rest = line:byte(1), line:sub(2)
  local reply = rest
  if kind == 36 then -- $
    local size = tonumber(rest)
    reply = false
    if size >= 0 then
      reply = socket:receive(size + 2)
      if not reply then return nil, "cut off" end
      reply = reply:sub(1, size)
    end
  elseif kind == 45 then -- -
    return nil, rest
  end
  socket:setkeepalive(60000, 128)
  return reply
end

local function refuse(status, title)
  ngx.status = status
  ngx.header["Content-Type"] = "application/problem+json"
  if status == 409 then ngx.header["Retry-After"] = "1" end
  ngx.print('{"title":"', title, '","status":', status, "}")
  return ngx.exit(status)
end

-- A record: "C" fingerprint token, or "D" fingerprint status, the header lines, an empty line, the body.
local function replay(found, fingerprint)
  if found:sub(2, 29) ~= fingerprint then return refuse(422, "the key belongs to another request") end
  if found:byte(1) == 67 then return refuse(409, "in flight") end
  local head_ends, body_starts = found:find("\n\n", 30, true)
  ngx.status = tonumber(found:sub(30, 32))
  for name, value in found:sub(33, head_ends):gmatch("\n([^:\n]+): ([^\n]*)") do ngx.header[name] = value end
  local body = found:sub(body_starts + 1)
  ngx.header["Idempotent-Replayed"] = "true"
  ngx.header["Content-Length"] = #body
  ngx.print(body)
  return ngx.exit(200)
end

function once.claim()
  local method = ngx.req.get_method()
  local key = ngx.var.http_idempotency_key
  if not key or (method ~= "POST" and method ~= "PATCH") then return end
  if #key == 0 or #key > 255 then return refuse(400, "no valid key") end
  ngx.req.read_body()
  local fingerprint = ngx.encode_base64(ngx.sha1_bin(method .. " " .. ngx.var.request_uri .. "\n" .. (ngx.req.get_body_data() or "")))
  local name = "once:" .. ngx.md5(ngx.var.http_authorization or "") .. ":" .. key
  local claim = "C" .. fingerprint .. ngx.var.request_id
  for _ = 1, 2 do
    local reply, problem = redis("SET", name, claim, "NX", "PX", CLAIM_MS)
    if problem then return refuse(503, "no store") end
    if reply == "OK" then
      ngx.ctx.once = { name = name, claim = claim, fingerprint = fingerprint, parts = {}, size = 0 }
      return
    end
    local found = redis("GET", name)
    if found then return replay(found, fingerprint) end
  end
  return refuse(409, "in flight")
end

function once.copy()
  local this = ngx.ctx.once
  if not this then return end
  local part = ngx.arg[1]
  this.size = this.size + #part
  if this.size > LARGEST then this.parts = {} elseif #part > 0 then this.parts[#this.parts + 1] = part end
  this.whole = ngx.arg[2] or this.whole
end

function once.store()
  local this = ngx.ctx.once
  if not this then return end
  local record = ""
  if this.whole and this.size <= LARGEST and ngx.status < 500 then
    local lines = { "D" .. this.fingerprint .. ngx.status }
    for name, value in pairs(ngx.resp.get_headers(0, true)) do
      if not NOT_STORED[name:lower()] and type(value) == "string" then lines[#lines + 1] = name .. ": " .. value end
    end
    record = table.concat(lines, "\n") .. "\n\n" .. table.concat(this.parts)
  end
  -- Sockets are not to be had in this phase, so a timer stores.
  ngx.timer.at(0, function() redis("EVAL", STORE, 1, this.name, this.claim, record, KEEP_MS) end)
end

return once

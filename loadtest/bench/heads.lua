-- For load.lua: keyed requests as clients send them. Beside the key, their heads differ in what differs between two calls
-- of one client. usage: local make = require("heads").payment; make(KEY, N); no N comes twice.
local kinds, turns = {}, { "payment", "llm", "traces", "apps", "tenants" }
local key, n

local function hex(digits) -- so many digits, at most 32
  local found = ""
  while #found < digits do found = found .. string.format("%07x", math.random(0, 0xfffffff)) end
  return found:sub(1, digits)
end

local function post(path, fields, body)
  local lines = { "POST " .. path .. " HTTP/1.1", "Host: " .. wrk.host .. ":" .. wrk.port }
  for _, field in ipairs(fields) do lines[#lines + 1] = field end
  lines[#lines + 1] = "Idempotency-Key: " .. key .. "-" .. hex(8) .. "-" .. n
  lines[#lines + 1] = "Content-Length: " .. #body
  return table.concat(lines, "\r\n") .. "\r\n\r\n" .. body
end

-- An SDK for payments: the telemetry of the call before, a trace, a form of varying length.
function kinds.payment(connection)
  local trace = hex(32)
  return post("/api/payments", {
    "Authorization: Bearer sk_test_4eC39HqLyjWDarjtT1zdp7dc",
    "User-Agent: Payments/v1 PythonBindings/16.1.0",
    "Accept: */*",
    "Accept-Encoding: gzip, deflate",
    "Connection: " .. (connection or "keep-alive"),
    "Content-Type: application/x-www-form-urlencoded",
    "Api-Version: 2026-10-28.acacia",
    'X-Client-User-Agent: {"bindings_version":"16.1.0","lang":"python","publisher":"example","httplib":"requests",' ..
      '"lang_version":"3.11.7","platform":"Linux","uname":"Linux host 6.1"}',
    'X-Client-Telemetry: {"last_request_metrics":{"request_id":"req_' .. hex(14) .. '","request_duration_ms":' ..
      math.random(3, 900) .. "}}",
    "traceparent: 00-" .. trace .. "-" .. trace:sub(1, 16) .. "-01",
  }, "amount=" .. math.random(1, 10 ^ math.random(1, 7)) .. "&currency=eur&customer=cus_NffrFeUfNV2Hib&confirm=true")
end

-- The same on a new connection each time.
function kinds.fresh() return kinds.payment("close") end

-- An SDK of an LLM: a request id, and a prompt of about 2 kB.
local prompt = {}
for word = 1, 400 do prompt[word] = string.char(97 + word % 26):rep(3 + word % 7) end
prompt = table.concat(prompt, " ")

function kinds.llm()
  return post("/api/chat/completions", {
    "Authorization: Bearer sk-proj-9f8e7d6c5b4a39281706f5e4d3c2b1a0",
    "User-Agent: LLM/Python 3.57.0",
    "Accept: application/json",
    "Accept-Encoding: gzip, deflate",
    "Connection: keep-alive",
    "Content-Type: application/json",
    "X-Stainless-Lang: python",
    "X-Stainless-Package-Version: 3.57.0",
    "X-Stainless-OS: Linux",
    "X-Stainless-Arch: x64",
    "X-Stainless-Runtime: CPython",
    "X-Stainless-Runtime-Version: 3.11.7",
    "X-Stainless-Async: false",
    "X-Stainless-Retry-Count: 0",
    "X-Stainless-Read-Timeout: 600",
    "X-Request-Id: " .. hex(8) .. "-" .. hex(4) .. "-4" .. hex(3) .. "-" .. hex(12),
  }, '{"model":"large-5","messages":[{"role":"system","content":"You are terse."},{"role":"user","content":"' ..
    prompt:sub(1, math.random(1700, 2100)) .. '"}],"temperature":0.2,"max_tokens":512,"user":"u' .. n .. '"}')
end

-- A service behind a mesh: trace, state and baggage, of which every part varies in length too.
function kinds.traces()
  return post("/api/orders", {
    "user-agent: orders/2.3",
    "accept: application/json",
    "content-type: application/json",
    "authorization: Bearer eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJvcmRlcnMifQ.c2lnbmF0dXJl",
    "traceparent: 00-" .. hex(32) .. "-" .. hex(16) .. "-0" .. math.random(0, 1),
    "tracestate: vendor=" .. hex(math.random(8, 24)) .. ",mesh=" .. hex(16),
    "baggage: user=" .. math.random(1, 10 ^ 6) .. ",session=" .. hex(12) .. ",plan=gold",
    "x-request-id: " .. hex(32),
    "x-envoy-attempt-count: 1",
  }, '{"item":' .. math.random(1, 10 ^ 5) .. ',"count":' .. math.random(1, 9) .. "}")
end

-- Apps on many devices: the version in User-Agent varies, and so does the account in the path.
function kinds.apps()
  return post("/api/accounts/acct_" .. hex(12) .. "/transfers?attempt=" .. math.random(1, 3), {
    "Accept: application/json",
    "Accept-Language: " .. (math.random() < 0.5 and "de-DE,de;q=0.9" or "en-GB"),
    "User-Agent: Wallet/" .. math.random(1, 9) .. "." .. math.random(0, 99) .. " (build " .. math.random(1000, 9999) .. "; iOS)",
    "Authorization: Bearer app_" .. ("4f"):rep(16),
    "Content-Type: application/json",
    "X-Device-Time: " .. 1790000000 + n,
  }, '{"amount":' .. math.random(1, 10 ^ 5) .. "}")
end

-- A gateway in front of many tenants: a thousand credentials, heads that are alike apart from them.
function kinds.tenants()
  return post("/api/invoices", {
    "Accept: */*",
    "User-Agent: gateway/1.9",
    "Authorization: Bearer tenant_" .. string.format("%04d", math.random(0, 999)) .. ("_secret"):rep(4),
    "Content-Type: application/json",
    "X-Request-Id: " .. hex(16),
  }, '{"amount":' .. math.random(1, 10 ^ 5) .. "}")
end

-- All of them in turns, as a connection of a gateway carries them.
function kinds.mixed() return kinds[turns[n % #turns + 1]]() end

math.randomseed(os.time())
local makes = {}
for name, kind in pairs(kinds) do
  makes[name] = function(new_key, number)
    key, n = new_key, number
    return kind()
  end
end
return makes

-- For wrk: wrk ... URL PATH KEY unique|same|many|KIND AUTHORIZATION BODY. A request's text is made once; only the key
-- changes. With many the same 500 keys come in turns. A KIND of heads.lua makes each request anew, and ignores the rest.
package.path = debug.getinfo(1, "S").source:match("@(.*/)") .. "?.lua"
local head, tail, unique, key, make, n, most

function init(args)
  local path, body = args[1], args[5]
  key, unique, n = args[2], args[3] ~= "same", 0
  most, make = args[3] == "many" and 500 or math.huge, require("heads")[args[3]]
  head = "POST " .. path .. " HTTP/1.1\r\nHost: " .. wrk.host .. ":" .. wrk.port ..
    "\r\nContent-Type: application/json\r\nAuthorization: " .. args[4]
  if key ~= "" then head = head .. "\r\nIdempotency-Key: " .. key end
  tail = "\r\nContent-Length: " .. #body .. "\r\n\r\n" .. body
end

function request()
  if not unique then return head .. tail end
  n = n < most and n + 1 or 1
  return make and make(key, n) or head .. "-" .. n .. tail
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format("RESULT %d %d %d %d %d %d\n", summary.requests, summary.duration, e.status,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50), latency:percentile(99)))
end

<?php
// Two requests of PHP's HTTP streams (file_get_contents), each on a connection of its own: prints what each got.
$found = [];
foreach (array_slice($argv, 1) as $url) {
    $options = ["method" => "POST", "content" => "1", "timeout" => 3, "ignore_errors" => true,
        "protocol_version" => 1.1, "header" => "Idempotency-Key: $url\r\nConnection: close"];
    $body = @file_get_contents($url, false, stream_context_create(["http" => $options]));
    $line = $http_response_header[0] ?? "";
    $found[] = $body === false ? "no answer" : [(int) (explode(" ", $line)[1] ?? 0), trim($body)];
}
echo json_encode($found);

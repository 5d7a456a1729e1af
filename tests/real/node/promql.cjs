// Reads expressions as a JSON list from standard input, and prints those that the grammar of Prometheus 3 does not take.
// node promql.cjs
const { parser } = require("@prometheus-io/lezer-promql");
const { readFileSync } = require("fs");

function isWrong(expression) {
  let wrong = false;
  parser.parse(expression).iterate({ enter: (node) => { wrong ||= node.type.isError; } });
  return wrong;
}

console.log(JSON.stringify(JSON.parse(readFileSync(0, "utf8")).filter(isWrong)));

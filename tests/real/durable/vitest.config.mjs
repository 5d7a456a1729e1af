export default { test: { include: ["**/test-runner.js"], exclude: [], testTimeout: 30000 } };

#!/bin/sh
# Tries out the jobworker that is first in PATH: a server, a job, its output, its exit code.
set -eu

folder=$(mktemp -d)
cd "$folder"
export HOME="$folder" JOB_WORKER_ADDR=127.0.0.1:0 JOB_WORKER_STATE_DIR="$folder/state"
export JOB_WORKER_CERT_PATH="$folder/certs" JOB_WORKER_STOP_JOBS=yes JOB_WORKER_DISK_RESERVE=0
jobworker --version
jobworker certs init >/dev/null
: >log  # to be there before the server is
job-worker 2>log &
server=$!
trap 'kill $server; wait $server; rm -rf "$folder"' EXIT
for _ in $(seq 300); do
    port=$(sed -n 's/.*listening on .*:\([0-9]*\)$/\1/p' log)
    [ -n "$port" ] && break
    sleep 0.1
done
export JOB_WORKER_SERVER="localhost:$port"
code=0
output=$(jobworker run -- sh -c 'echo it works; exit 7') || code=$?
echo "$output, exit code $code"
[ "$output, $code" = "it works, 7" ]

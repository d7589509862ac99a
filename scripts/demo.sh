#!/bin/sh
# A server of its own, and one job from its start to its ending: `make demo`.
# All that it makes is in a scratch folder, and gone afterwards.
set -eu

cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
folder=$(mktemp -d)
server=

main() {
    trap clean_up EXIT
    trap 'exit 130' INT TERM

    step "Certificates: an authority, a server, an admin and a viewer"
    run jobworker certs init "$folder/certs"

    step "A server"
    start_server
    run jobworker info

    limits=$(limits_that_hold 3>"$folder/left_out")
    step "A job with $(echo ${limits:-none of the limits}), streamed as it runs"
    cat "$folder/left_out"
    run jobworker create $limits --name demo sh -c '
        echo "I am process $$, and see these: $(cd /proc && echo [0-9]*)"
        for i in 1 2 3 4 5; do echo "line $i, $(date +%T)"; sleep 1; done
        echo "and one on stderr" >&2
        exit 3'
    show_cgroup
    run jobworker stream 1
    step "How it ended, and what it used"
    run jobworker get 1

    step "The end of the server"
    kill "$server"
    wait "$server"
    server=
    tail -n 2 "$folder/log"
}

start_server() {
    serve
    until port=$(sed -n 's/.*listening on .*:\([0-9]*\)$/\1/p' "$folder/log") && [ -n "$port" ]; do
        kill -0 "$server" 2>/dev/null || serve_unconfined
        sleep 0.05
    done
    sed 's/^/    /' "$folder/log"
    export JOB_WORKER_SERVER="localhost:$port" JOB_WORKER_CERT_PATH="$folder/certs"
}

serve() {
    : >"$folder/log"
    JOB_WORKER_ADDR=127.0.0.1:0 JOB_WORKER_STATE_DIR="$folder/state" JOB_WORKER_STOP_JOBS=yes JOB_WORKER_DISK_RESERVE=0 \
        JOB_WORKER_CERT_PATH="$folder/certs" jobworker serve 2>"$folder/log" &
    server=$!
}

# As in most containers of root's: for a demonstration, jobs need not be separated from the machine.
serve_unconfined() {
    cat "$folder/log" >&2
    grep -q JOB_WORKER_PROFILE "$folder/log" && [ -z "${JOB_WORKER_PROFILE:-}" ] || exit 1
    echo "    So once more, with jobs that nothing but a cgroup confines:"
    export JOB_WORKER_PROFILE=none
    serve
}

# The flags of those limits that this machine can enforce; to descriptor 3, why not the others.
limits_that_hold() {
    jobworker -o json info | python3 -c '
import json, sys
flags = {"cpu": "--max-cpu=50", "memory": "--max-memory=64", "io": "--max-iobps=1000000"}
left_out = open(3, "w")
for controller in json.load(sys.stdin)["controllers"]:
    flag = flags.get(controller["name"])
    if flag and controller["available"]:
        print(flag)
    elif flag:
        name, problem = controller["name"], controller["problem"]
        print(f"Left out: {flag}, as {name} is {problem}", file=left_out)
'
}

# The job itself sees its cgroup as the root of all, and its processes by other numbers.
show_cgroup() {
    cgroup=$(jobworker info | sed -n 's/^Cgroup: *\//\//p')
    [ -z "$cgroup" ] || run grep -H . "$cgroup/job-1/cgroup.procs" || :  # it may have ended
}

step() { printf '\n== %s\n' "$1"; }

run() {
    printf '$'
    for word; do printf ' %s' "$(quoted "$word")"; done
    echo
    "$@"
}

# So that it can be pasted into a shell.
quoted() {
    case $1 in
    '' | *[!A-Za-z0-9_./:=@%+-]*) printf "'%s'" "$(printf %s "$1" | sed "s/'/'\\\\''/g")" ;;
    *) printf %s "$1" ;;
    esac
}

clean_up() {
    [ -z "$server" ] || { kill "$server" 2>/dev/null && wait "$server" || :; }
    rm -rf "$folder"
}

main

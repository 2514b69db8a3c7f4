# What the scripts that measure have in common: cores, the binary, directories that are gone afterwards, a target. Sourced, from the
# top of the tree; it takes the script's arguments over from nobody and changes nothing but what it defines.
#
# RESILVER   the binary (built here, optimised, if not given)
# DISK_DIR   a directory on the disk that is meant (the one of the reports)
# CORES      server's and client's core (0,1)
# shellcheck shell=bash

IFS=, read -r server_core client_core <<<"${CORES:-0,1}"
pids=() undo=()

# set_up OUT: what every run needs first. OUT is where its reports go.
set_up() {
    [ "$(nproc)" -ge 2 ] || { echo "one core for the server and one for the client are needed" >&2; exit 1; }
    if [ -z "${RESILVER:-}" ]; then
        cargo build -q --release
        RESILVER=target/release/resilver
    fi
    mkdir -p "$1"
    disk_dir=$(mktemp -d "${DISK_DIR:-$1}/files.XXXXXX")
    memory_dir=$(mktemp -d /dev/shm/resilver-bench.XXXXXX)
    run_dir=$(mktemp -d)
    trap tear_down EXIT
    trap 'exit 130' INT TERM
}

# Ends what was started, newest last, and takes back what `undo` names, newest first.
tear_down() {
    local status=$? pid at
    for pid in "${pids[@]}"; do kill -CONT "$pid" 2>/dev/null && kill "$pid" 2>/dev/null; done
    for pid in "${pids[@]}"; do wait "$pid" 2>/dev/null || true; done
    for ((at = ${#undo[@]} - 1; at >= 0; at--)); do eval "${undo[at]}" || true; done
    [ $status = 0 ] || tail -n 5 "$run_dir"/*.log >&2 || true
    rm -rf "$run_dir" "$disk_dir" "$memory_dir"
    exit $status
}

# serve_resilver: a target on the server's core, with the sockets of its controllers in $run_dir/resilver.
serve_resilver() {
    "$RESILVER" serve --rpc-socket "$run_dir/resilver.rpc" --vhost-dir "$run_dir/resilver" --state-dir "$run_dir/state" \
        --cores "$server_core" >"$run_dir/resilver.log" 2>&1 &
    pids+=($!)
}

# rpc METHOD [PARAMETERS]: prints the result as JSON.
rpc() { "$RESILVER" --json rpc --rpc-socket "$run_dir/resilver.rpc" --wait 20s "$@"; }

# serve_file NAME FILE [BLOCK]: the file as a disk of blocks of so many bytes (512), and a controller of that name.
serve_file() {
    rpc bdev_uring_create "{\"name\":\"$1\",\"filename\":\"$2\",\"block_size\":${3:-512}}" >/dev/null
    serve_bdev "$1"
}
serve_bdev() { rpc vhost_create_blk_controller "{\"ctrlr\":\"$1\",\"dev_name\":\"$1\"}" >/dev/null; }

# make_file FILE MIB: written, not only allocated, for the first write to a fresh extent costs a journal entry, which is no server's;
# of bytes that nobody can compress or leave out; and gone from the page cache, for a direct request that meets pages there is handed
# to a kernel worker.
make_file() {
    [ ! -e "$1" ] || return 0
    head -c "${2}M" /dev/urandom >"$1"
    dd of="$1" oflag=nocache conv=notrunc,fdatasync count=0 status=none
}

# The version that is measured.
resilver_version() {
    echo "Resilver $("$RESILVER" --version | cut -d' ' -f2) at $(git describe --always --dirty 2>/dev/null || echo unknown)"
}

# A real SPDK beside us: what the scripts share that start one. Sourced, not run. SPDK_VHOST names SPDK's `vhost`, and `run_dir`
# a directory of the script's own, where SPDK's sockets and its log go: `spdk.rpc`, `spdk/CONTROLLER`, `spdk.log`.

spdk_pid= spdk_pages=0 spdk_memory=()

# spdk_reserve MIB: memory for an SPDK, in huge pages where they may be had, and 128 MiB more for what its front ends share with
# it. `spdk_release` gives them back.
spdk_reserve() {
    spdk_memory=(--no-huge -s "$1")
    [ -w /proc/sys/vm/nr_hugepages ] || return 0
    spdk_pages=$((($1 + 128) / 2))
    more_huge_pages $spdk_pages
    mkdir "$run_dir/huge" && mount -t hugetlbfs none "$run_dir/huge"
    spdk_memory=(--huge-dir "$run_dir/huge" -s "$1")
}
spdk_release() {
    [ $spdk_pages != 0 ] || return 0
    umount "$run_dir/huge" || true
    more_huge_pages -$spdk_pages
}
more_huge_pages() {
    local pages=/proc/sys/vm/nr_hugepages wanted
    wanted=$(($(cat $pages) + $1))
    # A page cache that has filled memory leaves no whole huge pages, until it is moved together or given up.
    echo 1 >/proc/sys/vm/compact_memory
    echo $wanted >$pages
    [ "$(cat $pages)" -ge $wanted ] || echo 1 >/proc/sys/vm/drop_caches
    echo $wanted >$pages
}

# spdk_start CORE: its process is spdk_pid; it answers when this returns.
spdk_start() {
    mkdir -p "$run_dir/spdk"
    # One that was killed leaves its own.
    rm -f "$run_dir/spdk.rpc"
    "$SPDK_VHOST" -m "[$1]" -S "$run_dir/spdk" -r "$run_dir/spdk.rpc" "${spdk_memory[@]}" >>"$run_dir/spdk.log" 2>&1 &
    spdk_pid=$!
    await_socket "$run_dir/spdk.rpc"
}

await_socket() {
    local begun=$SECONDS
    until [ -S "$1" ]; do
        [ $((SECONDS - begun)) -lt 20 ] || { echo "nobody listens on $1"; exit 1; }
        sleep 0.05
    done
}

# spdk_rpc METHOD PARAMETERS. The framing is Resilver's, but its client refuses methods that Resilver has not.
spdk_rpc() {
    python3 - "$run_dir/spdk.rpc" "$1" "$2" <<'PYTHON'
import json, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(sys.argv[1])
call = {"jsonrpc": "2.0", "id": 1, "method": sys.argv[2], "params": json.loads(sys.argv[3])}
connection.sendall(json.dumps(call).encode())
answer = b""
while True:
    answer += connection.recv(65536) or sys.exit("SPDK closed the connection")
    try:
        reply = json.loads(answer)
    except ValueError:
        continue
    sys.exit(f"{sys.argv[2]}: {reply['error']['message']}" if "error" in reply else 0)
PYTHON
}

# A target of ours and guests on its disks, led from here step by step. Sourced after common.sh, not run.
#
# A guest runs `agent`: it carries out what it is told on its second serial port and says how that went. So a run is one
# script, on this side; what happens to the guest's disk meanwhile stands where it happens. Every wait has an end.

declare -A qemu=() port_in=() port_out=() qmp_in=() qmp_out=()
target='' vm=''
memory=512

cleanup() {
    local it
    for it in ${qemu[@]+"${qemu[@]}"} $target; do kill -9 "$it" 2>/dev/null || true; done
    wait 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT

# fail WHAT: ends the run, with what the guests and the target said last.
fail() {
    local it
    echo "FAILED: $*"
    for it in "${!qemu[@]}"; do
        echo "the console of $it ends with:"
        tail -n 12 "$work/$it.console" "$work/$it.qemu" 2>/dev/null | sed 's|\r$||; s|^|   |'
    done
    echo "the target's log ends with:"
    tail -n 20 "$work/serve.log" | sed 's|^|   |'
    exit 1
}

# until_true SECONDS WHAT COMMAND...: waits until the command succeeds.
until_true() {
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ $SECONDS -lt $end ] || fail "$what"
        sleep 0.1
    done
}

# prepare: tools, kernel, programs and the guest's root with all that the runs on a disk need.
prepare() {
    need qemu-system-x86_64:qemu-system-x86 busybox:busybox-static cpio:cpio depmod:kmod mkfs.ext4:e2fsprogs \
        strip:binutils unxz:xz-utils gcc:gcc make:make
    get_kernel
    get_fio
    say "building"
    cargo build -q --manifest-path "$tree/Cargo.toml" -p resilver --bin resilver
    PATH=$tree/target/debug:$PATH
    export RESILVER_RPC_SOCKET=$work/rpc.sock
    add "$(command -v mkfs.ext4)"
    add "$(command -v e2fsck)"
    add "$fio"
    install "$tree/scripts/guest/verbs" "$work/root/verbs"
    make_initramfs "$tree/scripts/guest/agent" virtio_blk virtio_balloon "$@"
}

# serve: starts the target, as the last one left its configuration.
serve() {
    local config=()
    [ ! -e "$work/target.json" ] || config=(--config "$work/target.json")
    resilver serve --vhost-dir "$work" --state-dir "$work/state" ${config[@]+"${config[@]}"} >>"$work/serve.log" 2>&1 &
    target=$!
    resilver rpc --wait 30s rpc_get_methods >/dev/null || fail "the target did not start"
}

# end_target: stops it as an operator would.
end_target() {
    kill "$target"
    wait "$target" || fail "the target did not stop cleanly"
    target=
}

# new_disk NAME MIB [RING [OPTION...]]: a file, and its controller.
new_disk() {
    truncate -s "$2M" "$work/$1.raw"
    resilver bdev uring-create "$1" "$work/$1.raw" >/dev/null
    new_controller "$1" "${3:-split}" "${@:4}"
}
# new_controller BDEV RING [OPTION...]: serves it with split rings, or with packed ones too.
new_controller() {
    local packed=true
    [ "$2" = packed ] || packed=false
    resilver vhost create-blk-controller "$1.sock" "$1" --packed-ring $packed "${@:3}" >/dev/null
}

# boot_on NAME DISK QUEUES RING ARGUMENT...: starts a guest on a disk and waits until it takes commands.
boot_on() {
    local disk=$2 queues=$3 packed=off port fd
    vm=$1
    [ "$4" = split ] || packed=on
    shift 4
    for port in port qmp; do
        rm -f "$work/$vm.$port".{in,out}
        mkfifo "$work/$vm.$port".{in,out}
    done
    rm -f "$work/$vm.console"
    # init_on_alloc: a page that the kernel has cleared counts as written, and would hide that the disk wrote it unlogged.
    qemu-system-x86_64 -accel tcg,thread=multi -machine q35,memory-backend=mem -cpu max -smp 2 -m "$memory,slots=4,maxmem=4G" \
        -object "memory-backend-memfd,id=mem,size=${memory}M,share=on" -nodefaults -display none \
        -kernel "$kernel" -initrd "$work/initramfs" \
        -append "console=ttyS0 quiet panic=-1 memhp_default_state=online_movable init_on_alloc=0" \
        -chardev "socket,id=c,path=$work/$disk.sock,reconnect-ms=200" \
        -device "vhost-user-blk-pci,id=disk,chardev=c,num-queues=$queues,packed=$packed" \
        -serial "file:$work/$vm.console" -serial "pipe:$work/$vm.port" -qmp "pipe:$work/$vm.qmp" \
        "$@" </dev/null >"$work/$vm.qemu" 2>&1 &
    qemu[$vm]=$!
    # Both ends open here: neither QEMU nor we ever see an end of file.
    exec {fd}<>"$work/$vm.port.in" && port_in[$vm]=$fd
    exec {fd}<>"$work/$vm.port.out" && port_out[$vm]=$fd
    exec {fd}<>"$work/$vm.qmp.in" && qmp_in[$vm]=$fd
    exec {fd}<>"$work/$vm.qmp.out" && qmp_out[$vm]=$fd
    qmp qmp_capabilities
}

# next_line DESCRIPTOR: the next line is in `line` once it is whole; what a second brings of it is kept until then.
next_line() {
    local part='' result=0
    IFS= read -r -t 1 -u "$1" part || result=1
    line+=$part
    return $result
}
# hear SECONDS END: prints what the guest says until it says END, or anything else about an end.
hear() {
    local end=$((SECONDS + $1)) line=''
    while [ $SECONDS -lt $end ]; do
        gone "${qemu[$vm]}" && fail "QEMU of $vm has ended"
        next_line "${port_out[$vm]}" || continue
        case $line in
        "$2") return 0 ;;
        "DONE "*) return 1 ;;
        READY) fail "$vm has booted again, unasked" ;;
        *) echo "   $line" ;;
        esac
        line=
    done
    fail "no '$2' from $vm in $1 s"
}
booted() { hear 120 READY; }

# in_guest VERB...: has the guest do something (see `verbs`).
in_guest() {
    echo "$*" >&"${port_in[$vm]}"
    hear 240 "DONE 0" || fail "in $vm: $*"
}

# qmp COMMAND [ARGUMENTS]: has QEMU do something; `answer` is what it says. may_qmp: it may refuse.
qmp() { may_qmp "$@" || fail "QEMU's answer to $1: $answer"; }
may_qmp() {
    local end=$((SECONDS + 30)) line=''
    echo "{\"execute\":\"$1\",\"arguments\":${2:-{\}}}" >&"${qmp_in[$vm]}"
    while [ $SECONDS -lt $end ]; do
        gone "${qemu[$vm]}" && fail "QEMU of $vm has ended"
        next_line "${qmp_out[$vm]}" || continue
        answer=$line line=
        case $answer in
        '{"return"'*) return 0 ;;
        '{"error"'*) return 1 ;;
        esac
    done
    fail "QEMU does not answer to $1"
}

# power_off: the guest goes, as it would by itself.
power_off() {
    echo off >&"${port_in[$vm]}"
    ended
}
# ended: QEMU ends by itself.
ended() {
    until_true 60 "QEMU of $vm does not end" gone "${qemu[$vm]}"
    forget
}
# kill_guest: QEMU dies.
kill_guest() {
    kill -9 "${qemu[$vm]}"
    wait "${qemu[$vm]}" 2>/dev/null || true
    forget
}
gone() { ! kill -0 "$1" 2>/dev/null; }
forget() {
    local fd
    for fd in "${port_in[$vm]}" "${port_out[$vm]}" "${qmp_in[$vm]}" "${qmp_out[$vm]}"; do exec {fd}>&-; done
    unset "qemu[$vm]"
}

# mirror DISK [RATE]: starts to mirror it to a new file.
mirror() {
    say "resilver mirror start $1.sock $1-moved.raw --create"
    resilver mirror start "$1.sock" "$work/$1-moved.raw" --create --bandwidth "${2:-16MiB}" >/dev/null
}
# in_sync DISK: waits until both copies are equal.
in_sync() { resilver mirror wait "$1" --timeout 180s >/dev/null || fail "the mirror of $1 is not in sync"; }
# switch_over DISK: goes on with the new file.
switch_over() {
    say "resilver mirror complete $1"
    resilver mirror complete "$1" >/dev/null
    until_true 60 "$1 was not switched over" on_target "$1"
    resilver vhost list | sed 's|^|   |'
}
on_target() { resilver vhost list | grep -q "$1-target"; }

# fsck_of FILE: nobody uses it any more.
fsck_of() {
    e2fsck -f -n "$work/$1" >"$work/fsck" 2>&1 || { cat "$work/fsck"; fail "the file system in $1 is broken"; }
    say "host: the file system in $1 is clean: $(tail -n 1 "$work/fsck")"
}

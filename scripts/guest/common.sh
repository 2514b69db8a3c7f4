# What the guest scripts share: tools, kernel, initramfs, boot. Sourced, not run.
#
# A guest is QEMU without hardware acceleration, Debian's cloud kernel and an initramfs with busybox, the modules that the run
# needs, and our own programs. Everything that is downloaded is kept in a cache directory outside the tree.

cache=${RESILVER_GUEST_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/resilver/guest}
tree=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
work=$(mktemp -d)

say() { echo "== $*"; }

# Ends the run because something is missing here: not a failure, but said aloud, and counted where CI counts.
skip() {
    echo "skipped: $*"
    [ -z "${RESILVER_SKIP_LOG:-}" ] || echo "scripts/guest/$(basename "$0"): $*" >>"$RESILVER_SKIP_LOG"
    exit 0
}

# need COMMAND:PACKAGE...: installs what is missing where that may be done.
need() {
    local wanted=() pair
    for pair in "$@"; do
        command -v "${pair%%:*}" >/dev/null || wanted+=("${pair##*:}")
    done
    [ ${#wanted[@]} -eq 0 ] && return 0
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        skip "not installed: ${wanted[*]} (on Debian: apt-get install -t bookworm-backports ${wanted[*]})"
    fi
    if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
        echo "deb http://deb.debian.org/debian bookworm-backports main" \
            >/etc/apt/sources.list.d/resilver-backports.list
    fi
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -t bookworm-backports "${wanted[@]}" >/dev/null
}

# from_debian TOOL ARGUMENT...: apt-get or apt-cache with package lists of their own: the system's sources stay as they are.
from_debian() {
    local tool=$1 options
    shift
    options=(-qq -o "Dir::Etc::sourcelist=$cache/sources.list" -o Dir::Etc::sourceparts=-
        -o "Dir::State::lists=$cache/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache=)
    if [ ! -e "$cache/lists" ]; then
        mkdir -p "$cache/lists.new/partial"
        echo "deb http://deb.debian.org/debian bookworm-backports main" >"$cache/sources.list"
        echo "deb-src http://deb.debian.org/debian bookworm main" >>"$cache/sources.list"
        apt-get "${options[@]}" -o "Dir::State::lists=$cache/lists.new" update && mv "$cache/lists.new" "$cache/lists" || return 1
    fi
    "$tool" "${options[@]}" "$@"
}

# Downloads the kernel once; sets `kernel` and `modules` (a directory with lib/modules).
get_kernel() {
    modules=$cache/kernel
    if [ ! -e "$modules" ]; then
        say "getting Debian's cloud kernel"
        local new=$cache/kernel.new
        rm -rf "$new" && mkdir -p "$new"
        (
            cd "$new" &&
                package=$(from_debian apt-cache depends linux-image-cloud-amd64 |
                    awk '/Depends: linux-image/ { print $2; exit }') &&
                from_debian apt-get download "$package" && dpkg -x linux-image-*.deb . && rm linux-image-*.deb &&
                # The guest's modprobe takes them only as they are.
                find . -name "*.ko.xz" -exec unxz {} + && depmod -b . "$(ls lib/modules)"
        ) >"$cache/kernel.log" 2>&1 || { tail "$cache/kernel.log"; skip "Debian's cloud kernel cannot be had here"; }
        mv "$new" "$modules"
    fi
    kernel=$(ls "$modules"/boot/vmlinuz-*)
    version=$(ls "$modules/lib/modules")
}

# Builds fio once, static, from Debian's source; sets `fio`. (Debian's own brings 40 MB of libraries for storage that no guest has.)
get_fio() {
    fio=$cache/fio
    [ ! -e "$fio" ] || return 0
    say "building fio"
    local build=$cache/fio.build
    rm -rf "$build" && mkdir -p "$build"
    (
        cd "$build" && from_debian apt-get source --download-only fio &&
            tar xf fio_*.orig.tar.?z --strip-components=1 &&
            ./configure --build-static --disable-native --disable-numa --disable-rdma --disable-gfapi --disable-rbd \
                --disable-http --disable-pmem && make -j "$(nproc)" fio && strip fio
    ) >"$cache/fio.log" 2>&1 || { tail "$cache/fio.log"; skip "fio cannot be built here"; }
    mv "$build/fio" "$fio"
    rm -rf "$build"
}

# add PROGRAM [NAME]: puts a program and the libraries that it needs into the guest.
add() {
    local name=${2:-$(basename "$1")} library
    install -D "$1" "$work/root/bin/$name"
    strip "$work/root/bin/$name" 2>/dev/null || true
    for library in $(ldd "$1" 2>/dev/null | grep -o '/[^ ]*'); do
        [ -e "$work/root$library" ] || install -D "$library" "$work/root$library"
    done
}

# make_initramfs SCRIPT MODULE...: the guest's root; SCRIPT is what it runs.
make_initramfs() {
    local script=$1 module file
    shift
    mkdir -p "$work/root"/{bin,proc,sys,dev,tmp,mnt,run}
    add "$(command -v busybox)" busybox
    install "$tree/scripts/guest/init" "$work/root/init"
    install "$script" "$work/root/run.sh"
    for module in "$@"; do
        for file in $(modprobe -S "$version" -d "$modules" --show-depends "$module" |
            awk '$1 == "insmod" { print $2 }'); do
            install -D "$file" "$work/root/${file#"$modules"}"
        done
        echo "$module" >>"$work/root/modules"
    done
    cp "$modules/lib/modules/$version"/modules.{dep,builtin,order} "$work/root/lib/modules/$version/"
    (cd "$work/root" && find . | cpio -o -H newc --quiet | gzip -1) >"$work/initramfs"
}

# boot LIMIT ARGUMENT...: runs the guest for so many seconds at most. Its console comes on standard output, line by line
# (so sed -u: tr would keep a line that asks the host for something until it has a buffer full of them).
boot() {
    local limit=$1
    shift
    timeout "$limit" qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu max -smp 2 -m 1024 \
        -nodefaults -display none -serial stdio -no-reboot \
        -kernel "$kernel" -initrd "$work/initramfs" -append "console=ttyS0 quiet panic=-1" "$@" </dev/null |
        sed -u 's|\r$||'
}

# Shared by the scripts of this folder; sourced, not run.
# shellcheck shell=bash

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

# rustup puts cargo where a login shell finds it, a plain one may not.
if ! command -v cargo >/dev/null 2>&1 && [ -x "${CARGO_HOME:-$HOME/.cargo}/bin/cargo" ]; then
    PATH="${CARGO_HOME:-$HOME/.cargo}/bin:$PATH"
fi

die() {
    echo "$(basename "$0"): $*" >&2
    exit 1
}

need_cargo() {
    command -v cargo >/dev/null 2>&1 || die "there is no cargo; get a Rust toolchain with:
  apt-get install -y curl && curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y
  . \"\$HOME/.cargo/env\""
}

need_root() {
    [ "$(id -u)" = 0 ] || die "this needs root: it makes network namespaces, links and mounts"
}

# need_debian COMMAND-OR-PATH=PACKAGE...: installs the packages whose command or file is missing.
need_debian() {
    local missing=() entry probe
    for entry in "$@"; do
        probe=${entry%%=*}
        case $probe in
        /*) compgen -G "$probe" >/dev/null || missing+=("${entry#*=}") ;;
        *) command -v "$probe" >/dev/null 2>&1 || missing+=("${entry#*=}") ;;
        esac
    done
    [ "${#missing[@]}" = 0 ] && return 0
    command -v apt-get >/dev/null 2>&1 || die "these Debian packages are needed: ${missing[*]}"
    echo "Installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null || die "apt-get update failed"
    case " ${missing[*]} " in
    *" postgresql "*)
        # Only the programs are wanted: no server of its own shall start.
        apt-get install -y -qq --no-install-recommends postgresql-common </dev/null >/dev/null || die "apt-get failed"
        mkdir -p /etc/postgresql-common
        grep -qs '^create_main_cluster' /etc/postgresql-common/createcluster.conf ||
            echo 'create_main_cluster = false' >>/etc/postgresql-common/createcluster.conf
        ;;
    esac
    without_services apt-get install -y -qq --no-install-recommends "${missing[@]}" </dev/null >/dev/null ||
        die "apt-get could not install ${missing[*]}"
}

# Runs an installation that starts no service: containerd and podman bring one, and only the programs are wanted.
without_services() {
    local policy=/usr/sbin/policy-rc.d status=0
    if [ -e "$policy" ]; then
        "$@"
        return
    fi
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
    "$@" || status=$?
    rm -f "$policy"
    return "$status"
}

# What a build and a cluster of namespaces need.
need_cluster_packages() {
    need_debian cc=gcc /usr/include/stdlib.h=libc6-dev nsenter=util-linux losetup=mount findmnt=util-linux ip=iproute2 \
        nft=nftables setpriv=util-linux mkfs.ext4=e2fsprogs mkfs.xfs=xfsprogs \
        '/usr/lib/postgresql/*/bin/postgres=postgresql'
}

# Lists of Debian's packages, for the image, which is made of some of them.
need_package_lists() {
    apt-cache show e2fsprogs >/dev/null 2>&1 || apt-get update -qq </dev/null || die "apt-get update failed"
}

# What the tests use beside that: real clients of the protocols we speak.
need_test_packages() {
    need_debian nbdinfo=libnbd-bin nbdcopy=libnbd-bin qemu-img=qemu-utils qemu-io=qemu-utils qemu-nbd=qemu-utils fio=fio \
        nbdkit=nbdkit qemu-storage-daemon=qemu-system-common \
        ping=iputils-ping pgrep=procps xfs_repair=xfsprogs /usr/lib/cni/portmap=containernetworking-plugins iptables=iptables \
        busybox=busybox-static containerd=containerd runc=runc podman=podman
}

# What the tier vm uses beside that. Without the kernel its tests are skipped, with the reason.
need_vm_packages() {
    need_debian qemu-system-x86_64=qemu-system-x86 busybox=busybox-static cpio=cpio xz=xz-utils dmsetup=dmsetup \
        nbd-client=nbd-client strip=binutils e2fsck=e2fsprogs
    need_vm_kernel || echo "There is no kernel for the tier vm: its tests will be skipped."
}

# Debian's kernel from backports, unpacked beside the build and never installed. Its package list goes to a folder of its
# own, from the mirror that the machine uses already: the machine's package sources stay as they are.
need_vm_kernel() {
    local dir codename mirror keys package options
    dir="$(release_dir)/../vm"
    compgen -G "$dir/kernel/boot/vmlinuz-*" >/dev/null && return 0
    command -v apt-get >/dev/null 2>&1 || return 1
    codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
    # shellcheck disable=SC2016 # apt fills the names in
    mirror=$(apt-get indextargets --format '$(REPO_URI) $(CODENAME)' 'Created-By: Packages' |
        awk -v codename="$codename" '$2 == codename { print $1; exit }')
    [ -n "$mirror" ] || return 1
    keys=/usr/share/keyrings/debian-archive-keyring.gpg
    mkdir -p "$dir/apt/lists/partial" "$dir/apt/packages"
    dir=$(cd "$dir" && pwd)
    echo "deb $([ -e "$keys" ] && echo "[signed-by=$keys]") $mirror $codename-backports main" >"$dir/apt/sources.list"
    options=(-qq -o "Dir::Etc::SourceList=$dir/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o "Dir::State::Lists=$dir/apt/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
    echo "Downloading a kernel for the tier vm"
    apt-get "${options[@]}" update </dev/null || return 1
    package=$(apt-cache "${options[@]}" depends linux-image-cloud-amd64 | awk '/Depends: linux-image-/ { print $2; exit }')
    [ -n "$package" ] || return 1
    (cd "$dir/apt/packages" && apt-get "${options[@]}" download "$package" </dev/null) || return 1
    rm -rf "$dir/kernel.new" &&
        dpkg-deb -x "$dir/apt/packages/$package"_*.deb "$dir/kernel.new" &&
        mv "$dir/kernel.new" "$dir/kernel"
}

# The release that the tier kubernetes upgrades from, built beside ours and before it, so that the programs in release/ are ours in the
# end. Where the history lacks its commit (a shallow clone, an archive) the trial is skipped.
need_previous_release() {
    local version commit dir target
    read -r version commit <tests/kubernetes/previous-release
    target="$(release_dir)/.."
    dir="$target/previous/$commit"
    [ -e "$dir" ] && return 0
    if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
        echo "There is no commit $commit of $version: upgrading from it will be skipped."
        return 0
    fi
    echo "Building $version, to be upgraded from"
    rm -rf "$dir.new"
    mkdir -p "$dir.new/source" "$dir.new/programs" &&
        git archive "$commit" | tar -x -C "$dir.new/source" &&
        target=$(cd "$target" && pwd) &&
        (cd "$dir.new/source" && CARGO_TARGET_DIR="$target" cargo build --release --locked --workspace \
            --bin holdfast --bin holdfast-cni --bin holdfast-csi --bin holdfast-netd) &&
        cp "$target"/release/holdfast{,-cni,-csi,-netd} "$dir.new/programs/" &&
        mv "$dir.new" "$dir"
}

# Where release binaries land.
release_dir() {
    echo "${CARGO_TARGET_DIR:-target}/release"
}

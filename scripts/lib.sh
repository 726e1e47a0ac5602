# shellcheck shell=bash
# What the scripts share. Sourced, never run.

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Guests are large and outlive a clone of the repository, so they are cached outside it.
# shellcheck disable=SC2034  # used by those who source this
cache=${KNIBFS_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/knibfs}

say() { printf '%s\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

need_root() { [ "$(id -u)" = 0 ] || die "must run as root: use sudo $0"; }

# The release that apt serves, and the mirror that it takes it from.
# shellcheck disable=SC1091  # the file is the machine's
debian_release() { (. /etc/os-release && printf '%s' "$VERSION_CODENAME"); }
debian_mirror() {
    # shellcheck disable=SC2016  # apt expands these
    apt-get indextargets --format '$(RELEASE)|$(REPO_URI)' 'Created-By: Packages' |
        grep -m1 "^$(debian_release)|" | cut -d'|' -f2
}

# The name of the cache folder for a recipe: what was built by another version of the script is not taken for it.
recipe_key() { cat "$@" | sha256sum | cut -c1-12; }

kernel_package() { apt-cache depends linux-image-cloud-amd64 2>/dev/null | sed -nE 's/^ *Depends: (linux-image.*)/\1/p' | head -n1; }
# Downloads the cloud kernel's package into $1 and prints its path. The meta package names the current version.
download_kernel() {
    local dir=$1 package
    package=$(kernel_package)
    if [ -z "$package" ] && [ "$(id -u)" = 0 ]; then # images of containers come without apt's lists
        apt-get -q update >&2
        package=$(kernel_package)
    fi
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64: run apt-get update as root"
    (cd "$dir" && apt-get -q -o APT::Sandbox::User=root download "$package" >&2)
    printf '%s\n' "$dir/$package"_*.deb
}

# "kvm" or "tcg". A /dev/kvm that opens is not enough: on some paravirtual ones a stock kernel dies at once, so the test
# is whether the small guest comes up. The answer holds until the next boot of this machine.
accel() {
    local known answer=tcg
    known=/run/knibfs-accel-$(id -u)
    if [ -n "${KNIBFS_ACCEL:-}" ]; then printf '%s\n' "$KNIBFS_ACCEL"; return; fi
    if [ -r "$known" ]; then cat "$known"; return; fi
    if [ -w /dev/kvm ]; then
        local KERNEL INITRD values
        values=$("$repo/scripts/guest-small") # not inside eval, which would hide a failure
        eval "$values"
        # The guest says this word on its console once it is up; panic=-1 ends QEMU when its kernel dies.
        if timeout 30 qemu-system-x86_64 -accel kvm -cpu host -m 256 -nodefaults -no-reboot -display none -serial stdio \
            -kernel "$KERNEL" -initrd "$INITRD" -append 'console=ttyS0 panic=-1 knibfs.poweroff' </dev/null 2>/dev/null |
            grep -q knibfs-guest-ready; then
            answer=kvm
        fi
    fi
    printf '%s\n' "$answer" >"$known" 2>/dev/null || true
    printf '%s\n' "$answer"
}

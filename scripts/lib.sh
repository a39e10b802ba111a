# SPDX-License-Identifier: GPL-2.0-or-later
# shellcheck shell=bash
#
# Functions that all scripts share: they find a Python, install missing packages, and make the
# virtual environment. bash sources this file after `set -euo pipefail`, with `top` set to the root
# of the checkout.
#
# The functions need only bash, apt and the internet. They look for each thing before they install
# it. So a second start takes no noticeable time, and needs no root where no package is missing.

venv=${top:?is to be set by the script}/.venv
python=$venv/bin/python
me=scripts/$(basename "$0")

say() { printf '%s\n' "$me: $*" >&2; }

# die MESSAGE [HINT]: prints both and exits with 2; the hint says what to do.
die() {
    say "$1"
    [ $# -lt 2 ] || printf '  %s\n' "$2" >&2
    exit 2
}

require_root() {
    [ "$(id -u)" -eq 0 ] || die "needs root: it $1" "sudo $0"
}

# Runs a command; shows its output only when the command failed.
quietly() {
    local log
    log=$(mktemp)
    if "$@" >"$log" 2>&1 </dev/null; then
        rm -f "$log"
        return 0
    fi
    tail -n 40 "$log" >&2
    rm -f "$log"
    return 1
}

# Prints those of the given packages that are not installed.
missing_packages() {
    local package
    for package in "$@"; do
        [ "$(dpkg-query -W -f='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            printf '%s\n' "$package"
    done
}

# optional_packages PACKAGE...: like install_packages, but goes on when a package is not available.
optional_packages() {
    (install_packages "$@") || say "going on without"
}

apt_get() {
    quietly env DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 -q "$@"
}

# install_packages PACKAGE...: fails when one of them is missing and cannot be installed.
install_packages() {
    local missing
    if ! command -v dpkg-query >/dev/null || ! command -v apt-get >/dev/null; then
        say "not Debian or Ubuntu: install by hand what these packages contain: $*"
        return 0 # the build names what is missing
    fi
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -gt 0 ] || return 0
    [ "$(id -u)" -eq 0 ] ||
        die "packages are missing: ${missing[*]}" "sudo apt-get install ${missing[*]}"
    say "installing ${missing[*]}"
    apt_get update || say "apt-get update failed; trying with the package lists there are"
    apt_get install -y --no-install-recommends "${missing[@]}"
}

# Succeeds if "$1" is a Python that the project runs on.
suits() {
    command -v "$1" >/dev/null &&
        "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# Prints the Python to use: the system's own if it is new enough, else the first other one found.
find_python() {
    local candidate
    for candidate in /usr/bin/python3 python3 python3.{11,12,13,14,15,16}; do
        if suits "$candidate"; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

# Sets `base_python` to a newer Python from the archive, on releases whose own is too old
# (Ubuntu 22.04).
install_newer_python() {
    local version
    [ "$(id -u)" -eq 0 ] ||
        die "no Python 3.11 or newer" \
            "sudo apt-get install python3.11 python3.11-venv python3.11-dev"
    apt_get update || say "apt-get update failed; trying with the package lists there are"
    for version in 3.13 3.12 3.11; do
        if [ -n "$(apt-cache show "python$version" 2>/dev/null)" ]; then
            install_packages "python$version" "python$version-venv" "python$version-dev" && break
        fi
    done
    base_python=$(find_python) || die "no Python 3.11 or newer" \
        "Debian 12, Ubuntu 22.04 (with updates and universe) or newer have one"
}

# Sets `base_python`, and installs what it needs to make environments and C extensions.
require_python() {
    local version
    base_python=$(find_python) || install_newer_python
    # Debian splits off ensurepip and the headers for C extensions.
    if ! "$base_python" - <<'PY' >/dev/null 2>&1; then
import ensurepip, pathlib, sysconfig, venv
assert (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists()
PY
        version=$("$base_python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        install_packages "python$version-venv" "python$version-dev" ||
            die "cannot install python$version-venv and python$version-dev"
    fi
}

# Prints a hash of all sources of the package and its C extensions; a new hash means a new install.
build_stamp() {
    {
        "$base_python" -V
        printf '%s\n' "${ZSWAPD_PURE:-}"
        cat "$top/pyproject.toml" "$top/setup.py"
        # All sources: a list of what setup.py compiles would need upkeep.
        find "$top/zswapd" \( -name '*.py' -o -name '*.c' \) -print0 | sort -z | xargs -0 cat
    } | sha256sum | cut -c1-16
}

pip_install() {
    quietly "$python" -m pip install --disable-pip-version-check "$@" ||
        die "pip failed" "it needs the internet, or PIP_INDEX_URL of a mirror"
}

# require_venv EXTRAS: makes .venv with this checkout in it; EXTRAS is "" or e.g. "[test]".
require_venv() {
    local extras=$1 stamp
    mkdir -p "$top/build"
    exec 9>"$top/build/.install.lock"
    flock 9 # two scripts at once must not install into the same environment
    stamp=$venv/.installed-$(build_stamp)
    if ! suits "$python"; then
        say "making $venv with $base_python"
        quietly "$base_python" -m venv --clear "$venv" || die "cannot make $venv"
    fi
    if [ ! -e "$stamp$extras" ] && [ ! -e "${stamp}[test]" ]; then # [test] contains every other set
        # compat: the other mode maps packages only, and does not find the library that the compiled
        # modules share.
        say "building zswapd and installing what it needs into $venv"
        # Ubuntu 22.04's pip is too old for --config-settings; a newer pip stays.
        pip_install 'pip>=22.1'
        # mypyc's cache stays out of the checkout: after `sudo make dev` it is root's, and mypy, run
        # by the user, fails where it cannot write.
        MYPY_CACHE_DIR=$venv/.mypy_cache \
            pip_install --config-settings editable_mode=compat -e "$top$extras"
        # All byte code is written here: a process under `ulimit -f` or on a full disk would leave
        # a part of a file, which Python then takes for whole ("marshal data too short").
        quietly "$python" -m compileall -q -f "$top/zswapd" "$top/tools" || die "cannot compile"
        # The stamps of older sources.
        find "$venv" -maxdepth 1 -name '.installed-*' ! -name "${stamp##*/}*" -delete
        touch "$stamp" "$stamp$extras" # each set of extras contains the plain one
    fi
    exec 9>&-
}

# The packages that the daemon's build and the daemon need.
runtime_packages=(
    gcc libc6-dev pkg-config libfuse3-dev fuse3 liblzo2-dev libssl-dev liblz4-dev libxxhash-dev
    mount util-linux kmod
)

# Installs the emulator for the virtual machines of scripts/vm and tests/vm, and the programs that
# make an image without booting one.
require_emulator() {
    install_packages qemu-system-x86 mmdebstrap e2fsprogs util-linux
}

# prepare EXTRAS: installs the packages, finds a Python and makes .venv.
prepare() {
    install_packages "${runtime_packages[@]}" || die "packages could not be installed (see above)"
    require_python
    require_venv "$1"
}

# run_python ARGUMENT...: replaces the shell by the environment's Python. PYTHONPATH makes it find
# the checkout's modules from any directory. -P keeps it from importing a directory named scripts or
# tests in the caller's working directory.
run_python() {
    export PYTHONPATH=$top
    exec "$python" -P "$@"
}
